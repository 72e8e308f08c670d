// Counts what a process does on its GPUs, without changing the process: libcuda loads this library at its start when
// CUDA_INJECTION64_PATH names it. At exit the counts go to the file that SHADOWSERVE_COUNTS names, as one JSON object.
//
// It counts twice. What the GPU ran comes from CUPTI's activity records; what the process called, from CUPTI's callbacks at
// the driver's interface, every function by its name. Neither sees a call that CUPTI is too old to know: so the bytes of
// copies are summed on both sides, and the caller compares them with what must have been copied.
#include <cuda.h>
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUNCTIONS 4096 // more than CUPTI numbers

struct counts {
    unsigned long kernels, copies, copied_bytes, sets, dropped; // what the GPU ran
    unsigned long batch_pieces, batch_bytes;                    // what was asked of cuMemcpyBatchAsync
};
static struct counts counts;
static unsigned long calls[FUNCTIONS];
static const char *names[FUNCTIONS];
static char errors[1024];

static void add(unsigned long *to, unsigned long count) { __atomic_fetch_add(to, count, __ATOMIC_RELAXED); }

// Remembers what CUPTI refuses; the counts are worth nothing then.
static void check(const char *what, CUptiResult result) {
    const char *text = "?";
    if (result == CUPTI_SUCCESS) return;
    cuptiGetResultString(result, &text);
    size_t used = strlen(errors);
    snprintf(errors + used, sizeof errors - used, "%s%s: %s", used ? "; " : "", what, text);
}

static void CUPTIAPI give(uint8_t **buffer, size_t *size, size_t *records) {
    *size = 1 << 20;
    *buffer = aligned_alloc(8, *size);
    *records = 0;
}

static void CUPTIAPI take(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    size_t dropped = 0;
    (void)size;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
        case CUPTI_ACTIVITY_KIND_KERNEL: add(&counts.kernels, 1); break;
        case CUPTI_ACTIVITY_KIND_MEMCPY:
            add(&counts.copies, 1);
            add(&counts.copied_bytes, ((CUpti_ActivityMemcpy6 *)record)->bytes);
            break;
        case CUPTI_ACTIVITY_KIND_MEMSET: add(&counts.sets, 1); break;
        default: break;
        }
    }
    if (cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS) add(&counts.dropped, dropped);
    free(buffer);
}

static int begins(const char *name, const char *with) { return strncmp(name, with, strlen(with)) == 0; }

// The first four parameters of cuMemcpyBatchAsync, the same in every version of it.
struct batch {
    CUdeviceptr *to, *from;
    size_t *bytes, count;
};

static void CUPTIAPI called(void *data, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void *call) {
    const CUpti_CallbackData *info = call;
    (void)data;
    if (domain != CUPTI_CB_DOMAIN_DRIVER_API || info->callbackSite != CUPTI_API_ENTER || id >= FUNCTIONS) return;
    __atomic_store_n(&names[id], info->functionName, __ATOMIC_RELAXED);
    add(&calls[id], 1);
    if (begins(info->functionName, "cuMemcpyBatchAsync")) {
        const struct batch *batch = info->functionParams;
        unsigned long bytes = 0;
        for (size_t i = 0; i < batch->count; i++) bytes += batch->bytes[i];
        add(&counts.batch_pieces, batch->count);
        add(&counts.batch_bytes, bytes);
    }
    // Records of a context are to be taken before it goes.
    if (begins(info->functionName, "cuDevicePrimaryCtxRe") || begins(info->functionName, "cuCtxDestroy"))
        cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
}

static void finish(void) {
    const char *path = getenv("SHADOWSERVE_COUNTS");
    uint32_t version = 0;
    check("cuptiActivityFlushAll", cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
    cuptiGetVersion(&version);
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "{\"cupti\": %u, \"errors\": \"%s\", \"kernels\": %lu, \"copies\": %lu, \"copied_bytes\": %lu, \"memsets\": %lu, "
            "\"dropped_records\": %lu, \"batch_pieces\": %lu, \"batch_bytes\": %lu, \"calls\": {",
            version, errors, counts.kernels, counts.copies, counts.copied_bytes, counts.sets, counts.dropped,
            counts.batch_pieces, counts.batch_bytes);
    const char *comma = "";
    for (int id = 0; id < FUNCTIONS; id++) {
        if (!calls[id]) continue;
        fprintf(file, "%s\"%s\": %lu", comma, names[id], calls[id]);
        comma = ", ";
    }
    fprintf(file, "}}\n");
    fclose(file);
}

int InitializeInjection(void) {
    CUpti_SubscriberHandle subscriber;
    check("cuptiSubscribe", cuptiSubscribe(&subscriber, called, NULL));
    check("cuptiEnableDomain", cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API));
    check("cuptiActivityRegisterCallbacks", cuptiActivityRegisterCallbacks(give, take));
    check("concurrent kernels", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL));
    check("copies", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY));
    check("memsets", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET));
    check("cuptiActivityFlushPeriod", cuptiActivityFlushPeriod(100));
    atexit(finish);
    return 1;
}
