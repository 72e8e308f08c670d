/* net_memif with zero-copy=yes: the client's own mbufs are what its server writes received packets into and reads sent ones from.
 *
 * Four faults of the driver are mended here, by renaming its calls:
 *
 * - It closes the descriptors of the EAL's memory when it is connected. They are the EAL's own: the next connection hands out whatever has that
 *   number by then, and the server sees other memory, or none. It gets duplicates here.
 * - Its region is as long as the memory in use together, from the beginning of the EAL's list on: with a gap in it, too short. And every buffer
 *   is described as lying in the first region, which is whatever list comes first. Here it sees one list, the one that the pools lie in.
 * - It asks for descriptors, and allocates, while it holds the lock of the EAL's memory: a thread that needs more memory at that moment, and it, wait
 *   for each other for ever.
 * - When the server leaves, it forgets the mbufs that lie in the rings: a ring full with each connection. They go back to their pools here. What
 *   the driver knows of a queue is needed for that; `struct queue` is its layout, compared with what is known before it is used. */
#include "memif.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#include <rte_interrupts.h>

/* The most that a descriptor's 32-bit offset reaches. */
#define REACH ((uint64_t)1 << 32)
#define MAX_LOG2_RING 14

struct queue {
	struct rte_mempool *pool; /* of a receive queue */
	void *device;
	int type;
	uint16_t region;
	uint16_t port;
	uint32_t ring_offset;
	uint16_t last_head;
	uint16_t last_tail;
	struct rte_mbuf **mbufs; /* by descriptor; NULL until a connection begins */
	uint64_t packets, bytes;
	struct rte_intr_handle *interrupt; /* -1 while there is no connection */
	uint8_t log2_ring;
};

/* A ring in the shared memory: the protocol's own layout. */
struct ring {
	uint32_t cookie;
	uint16_t flags;
	uint16_t head;
};

/* The queues of a started port, both directions. */
static struct {
	struct queue **queues;
	unsigned int count;
} ports[RTE_MAX_ETHPORTS];

/* The list that all pools of such ports lie in. */
static const struct rte_memseg_list *shared;

struct extent {
	const struct rte_memseg_list *list;
	uint64_t bytes;
};

static void extend(struct rte_mempool *pool, void *argument, struct rte_mempool_memhdr *piece, unsigned int index)
{
	struct extent *extent = argument;
	const struct rte_memseg_list *list = rte_mem_virt2memseg_list(piece->addr);
	(void)pool;
	if (index == 0)
		extent->list = list;
	if (list == NULL || list->external || list != extent->list) {
		extent->bytes = UINT64_MAX;
		return;
	}
	uint64_t end = (uint64_t)((char *)piece->addr - (char *)list->base_va) + piece->len;
	if (extent->bytes < end)
		extent->bytes = end;
}

int shim_memif_share(struct rte_mempool *pool)
{
	struct extent extent = { 0 };
	rte_mempool_mem_iter(pool, extend, &extent);
	if (extent.list == NULL || extent.bytes > REACH)
		return -EFBIG;
	if (shared != NULL && shared != extent.list)
		return -EXDEV;
	shared = extent.list;
	return 0;
}

/* What is in use of a list: its first segment, and where the last one ends. */
struct used {
	const struct rte_memseg *first;
	uint64_t end;
};

static int note(const struct rte_memseg_list *list, const struct rte_memseg *segment, void *argument)
{
	struct used *used = argument;
	if (list != shared)
		return 0;
	if (used->first == NULL)
		used->first = segment;
	used->end = segment->addr_64 + segment->len;
	return 0;
}

/* What the driver calls in place of rte_memseg_walk: gets one segment, as long as the list is up to the end of what is in use of it. Not
 * from within the walk, which holds the lock of EAL's memory: the driver allocates some, and takes the lock again, for which it would wait for
 * ever behind a thread that waits for it to be free. */
int shim_memif_walk(rte_memseg_walk_t call, void *argument);
int shim_memif_walk(rte_memseg_walk_t call, void *argument)
{
	struct used used = { 0 };
	if (shared == NULL || rte_memseg_walk(note, &used) != 0 || used.first == NULL)
		return -1;
	struct rte_memseg whole = *used.first;
	whole.len = used.end - shared->addr_64;
	return call(shared, &whole, argument);
}

/* What the driver calls in place of rte_memseg_get_fd, with the segment from above. */
int shim_memif_segment_fd(const struct rte_memseg *whole);
int shim_memif_segment_fd(const struct rte_memseg *whole)
{
	int fd = rte_memseg_get_fd(rte_mem_virt2memseg(whole->addr, NULL));
	return fd < 0 ? fd : fcntl(fd, F_DUPFD_CLOEXEC, 3);
}

static bool is_as_expected(const struct queue *queue, uint16_t port, bool receives)
{
	return queue != NULL && queue->port == port && (queue->pool != NULL) == receives && queue->interrupt != NULL &&
	       rte_intr_type_get(queue->interrupt) == RTE_INTR_HANDLE_EXT;
}

void shim_memif_watch(uint16_t port)
{
	struct rte_eth_dev_info info;
	if (ports[port].count > 0 || rte_eth_dev_info_get(port, &info) != 0)
		return;
	unsigned int count = info.nb_rx_queues + info.nb_tx_queues;
	struct queue **queues = calloc(count, sizeof(*queues));
	for (unsigned int index = 0; queues != NULL && index < count; index++) {
		bool receives = index < info.nb_rx_queues;
		const struct rte_eth_fp_ops *ops = &rte_eth_fp_ops[port];
		queues[index] = receives ? ops->rxq.data[index] : ops->txq.data[index - info.nb_rx_queues];
		if (!is_as_expected(queues[index], port, receives)) {
			rte_log(RTE_LOG_ERR, RTE_LOGTYPE_EAL,
				"port %u: this DPDK's memif driver is not known: with zero-copy=yes, mbufs are lost when the server leaves\n",
				port);
			free(queues);
			return;
		}
	}
	ports[port].queues = queues;
	ports[port].count = queues == NULL ? 0 : count;
}

void shim_memif_unwatch(uint16_t port)
{
	free(ports[port].queues);
	ports[port].queues = NULL;
	ports[port].count = 0;
}

/* Frees what a queue's ring holds: what was given to the server and has not come back. */
static void empty(struct queue *queue, char *region, size_t bytes)
{
	struct ring *ring = (struct ring *)(region + queue->ring_offset);
	if (queue->log2_ring > MAX_LOG2_RING || queue->ring_offset + sizeof(*ring) > bytes)
		return;
	uint16_t size = (uint16_t)(1u << queue->log2_ring);
	uint16_t held = (uint16_t)(__atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) - queue->last_tail);
	/* The server can write there: what it cannot have been is not believed. */
	if (held > size) {
		rte_log(RTE_LOG_ERR, RTE_LOGTYPE_EAL, "port %u: the server left a ring of %u mbufs with %u in it: they are lost\n",
			queue->port, size, held);
		held = 0;
	}
	for (uint16_t index = 0; index < held; index++) {
		struct rte_mbuf **mbuf = &queue->mbufs[(uint16_t)(queue->last_tail + index) & (size - 1)];
		if (*mbuf != NULL)
			rte_pktmbuf_free_seg(*mbuf);
		*mbuf = NULL;
	}
	rte_free(queue->mbufs);
	queue->mbufs = NULL;
}

void shim_memif_empty(void *region, size_t bytes)
{
	for (uint16_t port = 0; port < RTE_MAX_ETHPORTS; port++) {
		for (unsigned int index = 0; index < ports[port].count; index++) {
			struct queue *queue = ports[port].queues[index];
			/* The driver has closed the interrupts of the connection that ends: it is this one's region. */
			if (queue->mbufs != NULL && rte_intr_fd_get(queue->interrupt) < 0 && shim_link_up(port) != 1)
				empty(queue, region, bytes);
		}
	}
}
