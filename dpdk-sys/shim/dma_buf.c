/* Memory of other devices that is known to this process as a dma-buf. Drivers are told of memory by its address (rte_dev_dma_map), which is enough
 * only where a kernel module resolves a GPU's addresses; those that can take a dma-buf (mlx5.c) look it up here. */
#include "shim.h"

#include <errno.h>
#include <pthread.h>

#define MOST 16

static struct {
	uintptr_t start;
	size_t bytes;
	int fd;
} noted[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int shim_dma_buf_note(const void *start, size_t bytes, int fd)
{
	int result = -ENOSPC;
	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < MOST && result != 0; i++) {
		if (noted[i].bytes != 0)
			continue;
		noted[i].start = (uintptr_t)start;
		noted[i].bytes = bytes;
		noted[i].fd = fd;
		result = 0;
	}
	pthread_mutex_unlock(&lock);
	return result;
}

void shim_dma_buf_forget(const void *start)
{
	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < MOST; i++)
		if (noted[i].start == (uintptr_t)start)
			noted[i].bytes = 0;
	pthread_mutex_unlock(&lock);
}

int shim_dma_buf_of(const void *start, size_t bytes, uint64_t *offset)
{
	int fd = -1;
	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < MOST; i++) {
		const uintptr_t first = (uintptr_t)start - noted[i].start;
		if ((uintptr_t)start < noted[i].start || first > noted[i].bytes || bytes > noted[i].bytes - first || noted[i].bytes == 0)
			continue;
		*offset = first;
		fd = noted[i].fd;
	}
	pthread_mutex_unlock(&lock);
	return fd;
}
