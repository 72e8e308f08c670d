// Counts what a process does on its GPUs, without changing the process: libcuda loads this library at its start when
// CUDA_INJECTION64_PATH names it. At exit the counts go to the file that SHADOWSERVE_COUNTS names, as one JSON object.
#include <cuda.h>
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned long kernels, copies, copied_bytes, sets, launches, copy_calls;

static void CUPTIAPI give(uint8_t **buffer, size_t *size, size_t *records) {
    *size = 1 << 20;
    *buffer = aligned_alloc(8, *size);
    *records = 0;
}

static void CUPTIAPI take(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    (void)context, (void)stream, (void)size;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
        case CUPTI_ACTIVITY_KIND_KERNEL: kernels++; break;
        case CUPTI_ACTIVITY_KIND_MEMCPY:
            copies++;
            copied_bytes += ((CUpti_ActivityMemcpy6 *)record)->bytes;
            break;
        case CUPTI_ACTIVITY_KIND_MEMSET: sets++; break;
        default: break;
        }
    }
    free(buffer);
}

// Entry points whose names begin so start kernels, or copies; counted at the interface, beside what the GPU reported.
static void CUPTIAPI called(void *data, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void *call) {
    const CUpti_CallbackData *info = call;
    (void)data, (void)domain, (void)id;
    if (info->callbackSite != CUPTI_API_ENTER) return;
    const char *names[] = {"cuLaunch", "cuGraphLaunch", "cuMemcpy"};
    for (int i = 0; i < 3; i++) {
        const char *a = names[i], *b = info->functionName;
        while (*a && *a == *b) a++, b++;
        if (!*a) i == 2 ? copy_calls++ : launches++;
    }
}

static void finish(void) {
    const char *path = getenv("SHADOWSERVE_COUNTS");
    cuptiActivityFlushAll(1);
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "{\"kernels\": %lu, \"launch_calls\": %lu, \"copy_calls\": %lu, \"copies\": %lu, \"copied_bytes\": %lu, \"memsets\": %lu}\n",
            kernels, launches, copy_calls, copies, copied_bytes, sets);
    fclose(file);
}

int InitializeInjection(void) {
    CUpti_SubscriberHandle subscriber;
    cuptiActivityRegisterCallbacks(give, take);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    cuptiSubscribe(&subscriber, called, NULL);
    cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API);
    atexit(finish);
    return 1;
}
