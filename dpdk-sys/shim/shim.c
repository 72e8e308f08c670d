#include "shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if RTE_VERSION >= RTE_VERSION_NUM(22, 11, 0, 0)
#include <rte_bus.h>
#endif

int shim_errno(void) { return rte_errno; }
unsigned int shim_lcore_id(void) { return rte_lcore_id(); }
uint64_t shim_tsc(void) { return rte_rdtsc(); }

uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_rx_burst(port, queue, mbufs, n);
}

uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_tx_burst(port, queue, mbufs, n);
}

struct rte_mbuf *shim_mbuf_alloc(struct rte_mempool *pool) { return rte_pktmbuf_alloc(pool); }

int shim_mbuf_alloc_bulk(struct rte_mempool *pool, struct rte_mbuf **mbufs, unsigned int n)
{
	return rte_pktmbuf_alloc_bulk(pool, mbufs, n);
}

void shim_mbuf_free(struct rte_mbuf *mbuf) { rte_pktmbuf_free(mbuf); }
int shim_mbuf_chain(struct rte_mbuf *head, struct rte_mbuf *tail) { return rte_pktmbuf_chain(head, tail); }
uint16_t shim_pool_data_room(struct rte_mempool *pool) { return rte_pktmbuf_data_room_size(pool); }

unsigned int shim_ring_enqueue_burst(struct rte_ring *ring, void *const *items, unsigned int n)
{
	return rte_ring_enqueue_burst(ring, items, n, NULL);
}

unsigned int shim_ring_dequeue_burst(struct rte_ring *ring, void **items, unsigned int n)
{
	return rte_ring_dequeue_burst(ring, items, n, NULL);
}

unsigned int shim_ring_count(const struct rte_ring *ring) { return rte_ring_count(ring); }
unsigned int shim_ring_capacity(const struct rte_ring *ring) { return rte_ring_get_capacity(ring); }

uint32_t shim_softrss(uint32_t *tuple, uint32_t words, const uint8_t *key) { return rte_softrss(tuple, words, key); }

size_t shim_log_types(char *text, size_t size)
{
	char *buffer = NULL;
	size_t length = 0;
	FILE *stream = open_memstream(&buffer, &length);
	if (stream == NULL)
		return 0;
	rte_log_dump(stream);
	fclose(stream);
	if (length > size)
		length = size;
	memcpy(text, buffer, length);
	free(buffer);
	return length;
}

const char *shim_device_bus(const struct rte_device *device) { return rte_bus_name(rte_dev_bus(device)); }
const char *shim_device_name(const struct rte_device *device) { return rte_dev_name(device); }
