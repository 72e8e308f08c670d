#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <rte_bus.h>
#include <rte_devargs.h>

/* Sends standard output, where a wrong argument makes EAL print its usage, to /dev/null. Returns what restore_stdout needs. */
static int silence_stdout(void)
{
	fflush(stdout);
	int saved = dup(STDOUT_FILENO);
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	if (saved >= 0 && null >= 0)
		dup2(null, STDOUT_FILENO);
	if (null >= 0)
		close(null);
	return saved;
}

static void restore_stdout(int saved)
{
	fflush(stdout);
	if (saved < 0)
		return;
	dup2(saved, STDOUT_FILENO);
	close(saved);
}

int shim_eal_init(int argc, char **argv, char *log, size_t size)
{
	char *text = NULL;
	size_t length = 0;
	FILE *stream = open_memstream(&text, &length);
	if (stream != NULL)
		rte_openlog_stream(stream);
	int saved = silence_stdout();
	rte_errno = 0;
	int result = rte_eal_init(argc, argv);
	if (result < 0)
		result = rte_errno != 0 ? -rte_errno : -EINVAL;
	restore_stdout(saved);
	rte_openlog_stream(stderr);
	if (size > 0)
		log[0] = '\0';
	if (stream == NULL)
		return result;
	/* Not closed: another thread of EAL may be in the midst of writing to it. */
	fflush(stream);
	if (size > 0 && text != NULL) {
		if (length >= size)
			length = size - 1;
		memcpy(log, text, length);
		log[length] = '\0';
	}
	return result;
}

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

int shim_link_up(uint16_t port)
{
	struct rte_eth_link link = {0};
	return rte_eth_link_get_nowait(port, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}

struct rte_mbuf *shim_mbuf_alloc(struct rte_mempool *pool) { return rte_pktmbuf_alloc(pool); }

int shim_mbuf_alloc_bulk(struct rte_mempool *pool, struct rte_mbuf **mbufs, unsigned int n)
{
	return rte_pktmbuf_alloc_bulk(pool, mbufs, n);
}

void shim_mbuf_free(struct rte_mbuf *mbuf) { rte_pktmbuf_free(mbuf); }
int shim_mbuf_chain(struct rte_mbuf *head, struct rte_mbuf *tail) { return rte_pktmbuf_chain(head, tail); }
uint16_t shim_pool_data_room(struct rte_mempool *pool) { return rte_pktmbuf_data_room_size(pool); }

static void count_detached(void *start, void *detached)
{
	(void)start;
	__atomic_add_fetch((uint64_t *)detached, 1, __ATOMIC_RELEASE);
}

struct rte_mbuf *shim_external_attach(struct rte_mempool *pool, void *start, rte_iova_t iova, uint16_t length, uint64_t *detached)
{
	struct rte_mbuf *mbuf = rte_pktmbuf_alloc(pool);
	if (mbuf == NULL)
		return NULL;
	struct rte_mbuf_ext_shared_info *count = rte_mbuf_to_priv(mbuf);
	count->free_cb = count_detached;
	count->fcb_opaque = detached;
	rte_mbuf_ext_refcnt_set(count, 1);
	rte_pktmbuf_attach_extbuf(mbuf, start, iova, length, count);
	mbuf->data_len = length;
	mbuf->pkt_len = length;
	return mbuf;
}

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

const char *shim_device_arguments(const struct rte_device *device)
{
	const struct rte_devargs *arguments = rte_dev_devargs(device);
	return arguments != NULL ? arguments->args : NULL;
}
