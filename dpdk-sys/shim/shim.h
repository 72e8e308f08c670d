/* What Rust sees of DPDK: the headers to bind, and declarations for the functions that DPDK defines inline or keeps in
 * thread-local variables, which bindgen cannot reach. One line of shim.c each. */
#ifndef SHIM_H
#define SHIM_H

#include <stddef.h>
#include <rte_config.h>
#include <rte_version.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_log.h>
#include <rte_lcore.h>
#include <rte_launch.h>
#include <rte_dev.h>
#include <rte_cycles.h>
#include <rte_memory.h>
#include <rte_malloc.h>
#include <rte_eal_memconfig.h>
#include <rte_ring.h>
#include <rte_mempool.h>
#include <rte_mbuf.h>
#include <rte_mbuf_pool_ops.h>
#include <rte_ether.h>
#include <rte_ethdev.h>
#include <rte_eth_ring.h>
#include <rte_thash.h>
#include <rte_compressdev.h>

/* The paths of mbuf fields differ between releases (unions were renamed), their C names do not: bindgen evaluates these. */
enum shim_mbuf_offset {
	SHIM_MBUF_BUF_ADDR = offsetof(struct rte_mbuf, buf_addr),
	SHIM_MBUF_DATA_OFF = offsetof(struct rte_mbuf, data_off),
	SHIM_MBUF_REFCNT = offsetof(struct rte_mbuf, refcnt),
	SHIM_MBUF_NB_SEGS = offsetof(struct rte_mbuf, nb_segs),
	SHIM_MBUF_PORT = offsetof(struct rte_mbuf, port),
	SHIM_MBUF_OL_FLAGS = offsetof(struct rte_mbuf, ol_flags),
	SHIM_MBUF_PKT_LEN = offsetof(struct rte_mbuf, pkt_len),
	SHIM_MBUF_DATA_LEN = offsetof(struct rte_mbuf, data_len),
	SHIM_MBUF_HASH_RSS = offsetof(struct rte_mbuf, hash.rss),
	SHIM_MBUF_POOL = offsetof(struct rte_mbuf, pool),
	SHIM_MBUF_NEXT = offsetof(struct rte_mbuf, next),
	SHIM_MBUF_TX_OFFLOAD = offsetof(struct rte_mbuf, tx_offload),
	SHIM_MBUF_BUF_LEN = offsetof(struct rte_mbuf, buf_len),
};

/* rte_eal_init with standard output closed to it, and its messages in `log` (cut at `size`, NUL-terminated). Messages that come later go to
 * standard error. Returns what rte_eal_init returned, or minus rte_errno. */
int shim_eal_init(int argc, char **argv, char *log, size_t size);
/* rte_eal_cleanup, with EAL's interrupt thread out of the way for good. */
int shim_eal_cleanup(void);

int shim_errno(void);
unsigned int shim_lcore_id(void);
uint64_t shim_tsc(void);

uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);

/* The same for net_memif, safe while the peer comes and goes; see memif.c. */
uint16_t shim_memif_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
uint16_t shim_memif_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
/* Starts a configured net_memif port; a client keeps trying to reach its server until it is closed. */
int shim_memif_start(uint16_t port, int is_client, int is_zero_copy);
/* Before a client with zero-copy=yes is started: its server will see the memory of this pool. -EXDEV when a pool was shared that lies in
 * another of the EAL's lists, -EFBIG when it lies in several, or too far from their beginning to be described. */
int shim_memif_share(struct rte_mempool *pool);
void shim_memif_close(uint16_t port);

/* 1 when the link is up; never waits for it. */
int shim_link_up(uint16_t port);

struct rte_mbuf *shim_mbuf_alloc(struct rte_mempool *pool);
int shim_mbuf_alloc_bulk(struct rte_mempool *pool, struct rte_mbuf **mbufs, unsigned int n);
void shim_mbuf_free(struct rte_mbuf *mbuf);
int shim_mbuf_chain(struct rte_mbuf *head, struct rte_mbuf *tail);
uint16_t shim_pool_data_room(struct rte_mempool *pool);
/* An mbuf of a pool without buffers and with a struct rte_mbuf_ext_shared_info of private area each, that is `length` bytes of external memory.
 * Is counted in `detached` when it is freed. NULL when the pool is empty. */
struct shim_detached {
	/* Those that lcore `lcore` freed, which alone writes this; and those that others did. */
	uint64_t own;
	uint64_t others;
	/* Only to be changed while none is out. */
	uint32_t lcore;
};
struct rte_mbuf *shim_external_attach(struct rte_mempool *pool, void *start, rte_iova_t iova, uint16_t length, struct shim_detached *detached);

/* Notes that memory is a dma-buf too, from its first byte on; -ENOSPC if too many are noted. The descriptor stays open until it is forgotten. */
int shim_dma_buf_note(const void *start, size_t bytes, int fd);
void shim_dma_buf_forget(const void *start);
/* The dma-buf that all of a range lies in, and where in it; -1 if there is none. */
int shim_dma_buf_of(const void *start, size_t bytes, uint64_t *offset);

/* Whether a device puts the parts of a received packet into buffers of different pools, of `parts` parts, cut at any length. */
int shim_splits_packets(const struct rte_eth_dev_info *info, uint16_t parts);
/* Does what a NIC does with the UDP checksum of a received packet that lies in one buffer: notes whether it is right, if there is one. */
void shim_check_udp(struct rte_mbuf *mbuf);
/* Has the device bring UDP datagrams for `udp_port`, over IPv4 or IPv6, to one queue, whatever RSS would do. 0, or minus an errno; then `why`,
 * of `size` bytes, says what the driver said. */
int shim_steer_udp(uint16_t port, int ipv6, uint16_t udp_port, uint16_t queue, char *why, size_t size);

unsigned int shim_ring_enqueue_burst(struct rte_ring *ring, void *const *items, unsigned int n);
unsigned int shim_ring_dequeue_burst(struct rte_ring *ring, void **items, unsigned int n);
unsigned int shim_ring_count(const struct rte_ring *ring);
unsigned int shim_ring_capacity(const struct rte_ring *ring);

uint32_t shim_softrss(uint32_t *tuple, uint32_t words, const uint8_t *key);

/* Writes the names of all registered log types, one a line, cut at `size`; every linked driver registers one. */
size_t shim_log_types(char *text, size_t size);
/* The bus a device sits on ("pci", "vdev", ...). */
const char *shim_device_bus(const struct rte_device *device);
/* What follows the name in a device's arguments ("role=client,bsize=9216"), or NULL. */
const char *shim_device_arguments(const struct rte_device *device);

/* Compression devices (compress.c). The enums and structures of rte_comp.h change between releases, LZ4 came with 23.03: what Rust needs of them
 * goes through these. */
enum shim_comp_algorithm {
	SHIM_COMP_DEFLATE,
	SHIM_COMP_LZS,
	SHIM_COMP_LZ4,
};

struct shim_comp_capability {
	uint64_t features; /* RTE_COMP_FF_* */
	uint8_t window_log2_min, window_log2_max;
};

/* 1 when the device has that algorithm. */
int shim_comp_capability(uint8_t device, enum shim_comp_algorithm algorithm, struct shim_comp_capability *found);
/* Makes what a device needs to decompress Deflate streams without checksum. 0, or minus an errno. */
int shim_comp_inflate_xform(uint8_t device, uint8_t window_log2, void **xform);
/* Fills in an op that decompresses `length` bytes from `offset` of `source`. */
void shim_comp_op_set(struct rte_comp_op *op, void *xform, struct rte_mbuf *source, uint32_t offset, uint32_t length,
		      struct rte_mbuf *destination);
/* RTE_COMP_OP_STATUS_* */
uint8_t shim_comp_op_status(const struct rte_comp_op *op);
uint32_t shim_comp_op_produced(const struct rte_comp_op *op);
/* One pointer of ours behind the op; its pool is made with that much room. */
void **shim_comp_op_user(struct rte_comp_op *op);

/* What an mbuf on memory that is not its pool's needs, and how to make one: `shared` counts `references` of such mbufs, and nothing is freed with
 * the last of them. `data_bytes` of the memory are the mbuf's data, `packet_bytes` is what it states as the packet's length. */
void shim_mbuf_share(struct rte_mbuf_ext_shared_info *shared, uint16_t references);
void shim_mbuf_attach(struct rte_mbuf *mbuf, void *memory, uint16_t data_bytes, uint32_t packet_bytes,
		      struct rte_mbuf_ext_shared_info *shared);

/* 1 when ISA-L's shared library is found, 0 when the compress_isal driver cannot work. */
int shim_isal_available(void);

#endif
