#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <rte_bus.h>
#include <rte_devargs.h>
#include <rte_flow.h>
#include <rte_interrupts.h>
#include <rte_ip.h>
#include <rte_udp.h>

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

static void park(void *parked)
{
	__atomic_store_n((bool *)parked, true, __ATOMIC_RELEASE);
	for (;;)
		pause();
}

/* EAL unmaps the memory that interrupt handles lie in, having just woken the thread that looks at all of them, and does not wait for it. So that
 * thread is first given a call that never ends, of a source of its own, since EAL waits for the calls of others. It does not keep the process
 * from ending, and EAL cannot be started again. */
static void park_interrupt_thread(void)
{
	static bool parked;
	struct rte_intr_handle *handle = rte_intr_instance_alloc(RTE_INTR_INSTANCE_F_PRIVATE);
	int fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
	if (handle == NULL || fd < 0 || rte_intr_fd_set(handle, fd) != 0 || rte_intr_type_set(handle, RTE_INTR_HANDLE_EXT) != 0 ||
	    rte_intr_callback_register(handle, park, &parked) != 0)
		return;
	const struct timespec moment = { .tv_nsec = 100000 };
	while (!__atomic_load_n(&parked, __ATOMIC_ACQUIRE))
		nanosleep(&moment, NULL);
}

int shim_eal_cleanup(void)
{
	park_interrupt_thread();
	return rte_eal_cleanup();
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
	struct shim_detached *count = detached;
	(void)start;
	/* Nearly always it is the lcore that attached them: a locked instruction would wait until the packet has been copied. */
	if (count->lcore == rte_lcore_id() && count->lcore != LCORE_ID_ANY)
		__atomic_store_n(&count->own, __atomic_load_n(&count->own, __ATOMIC_RELAXED) + 1, __ATOMIC_RELEASE);
	else
		__atomic_add_fetch(&count->others, 1, __ATOMIC_RELEASE);
}

struct rte_mbuf *shim_external_attach(struct rte_mempool *pool, void *start, rte_iova_t iova, uint16_t length, struct shim_detached *detached)
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

int shim_splits_packets(const struct rte_eth_dev_info *info, uint16_t parts)
{
	return (info->rx_offload_capa | info->rx_queue_offload_capa) & RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT &&
	       info->rx_seg_capa.multi_pools && info->rx_seg_capa.max_nseg >= parts;
}

void shim_check_udp(struct rte_mbuf *mbuf)
{
	const struct rte_ether_hdr *ethernet = rte_pktmbuf_mtod(mbuf, const struct rte_ether_hdr *);
	uint32_t offset = sizeof(*ethernet), bytes = mbuf->data_len;
	if (mbuf->nb_segs != 1 || bytes < offset + sizeof(struct rte_vlan_hdr) + sizeof(struct rte_ipv4_hdr))
		return;
	rte_be16_t type = ethernet->ether_type;
	if (type == rte_cpu_to_be_16(RTE_ETHER_TYPE_VLAN)) {
		type = ((const struct rte_vlan_hdr *)(ethernet + 1))->eth_proto;
		offset += sizeof(struct rte_vlan_hdr);
	}
	const void *ip = rte_pktmbuf_mtod_offset(mbuf, const void *, offset);
	bool is_right;
	if (type == rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV4)) {
		const struct rte_ipv4_hdr *header = ip;
		const uint32_t begin = rte_ipv4_hdr_len(header), end = rte_be_to_cpu_16(header->total_length);
		if (header->next_proto_id != IPPROTO_UDP || begin < sizeof(*header) || end > bytes - offset ||
		    end < begin + sizeof(struct rte_udp_hdr))
			return;
		const struct rte_udp_hdr *udp = RTE_PTR_ADD(ip, begin);
		if (udp->dgram_cksum == 0)
			return;
		is_right = rte_ipv4_udptcp_cksum_verify(header, udp) == 0;
	} else if (type == rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV6)) {
		const struct rte_ipv6_hdr *header = ip;
		if (bytes < offset + sizeof(*header) || header->proto != IPPROTO_UDP)
			return;
		const uint32_t payload = rte_be_to_cpu_16(header->payload_len);
		if (payload < sizeof(struct rte_udp_hdr) || payload > bytes - offset - sizeof(*header))
			return;
		is_right = rte_ipv6_udptcp_cksum_verify(header, header + 1) == 0;
	} else {
		return;
	}
	mbuf->ol_flags |= is_right ? RTE_MBUF_F_RX_L4_CKSUM_GOOD : RTE_MBUF_F_RX_L4_CKSUM_BAD;
}

int shim_steer_udp(uint16_t port, int ipv6, uint16_t udp_port, uint16_t queue, char *why, size_t size)
{
	const struct rte_flow_attr attributes = {.ingress = 1};
	const struct rte_flow_item_udp udp = {.hdr.dst_port = rte_cpu_to_be_16(udp_port)};
	const struct rte_flow_item_udp mask = {.hdr.dst_port = 0xffff};
	const struct rte_flow_item pattern[] = {
		{.type = RTE_FLOW_ITEM_TYPE_ETH},
		{.type = ipv6 ? RTE_FLOW_ITEM_TYPE_IPV6 : RTE_FLOW_ITEM_TYPE_IPV4},
		{.type = RTE_FLOW_ITEM_TYPE_UDP, .spec = &udp, .mask = &mask},
		{.type = RTE_FLOW_ITEM_TYPE_END},
	};
	const struct rte_flow_action_queue to = {.index = queue};
	const struct rte_flow_action actions[] = {
		{.type = RTE_FLOW_ACTION_TYPE_QUEUE, .conf = &to},
		{.type = RTE_FLOW_ACTION_TYPE_END},
	};
	struct rte_flow_error error = {0};
	if (rte_flow_create(port, &attributes, pattern, actions, &error) != NULL)
		return 0;
	snprintf(why, size, "%s", error.message != NULL ? error.message : rte_strerror(rte_errno));
	return rte_errno != 0 ? -rte_errno : -1;
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
