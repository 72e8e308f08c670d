/* Between memif.c and memif_zero_copy.c. */
#ifndef SHIM_MEMIF_H
#define SHIM_MEMIF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A zero-copy port was started, or is to be closed. On the interrupt thread. */
void shim_memif_watch(uint16_t port);
void shim_memif_unwatch(uint16_t port);
/* A connection has ended and this region is about to be unmapped, which no lcore uses any more: returns the mbufs that lie in its rings. */
void shim_memif_empty(void *region, size_t bytes);

#endif
