/* What Rust needs of compressdev's inline functions, unions and enums. */
#include "shim.h"

#include <errno.h>
#include <string.h>

/* The release's own number of an algorithm, or -1 where it has none. */
static int algorithm_number(enum shim_comp_algorithm algorithm)
{
	switch (algorithm) {
	case SHIM_COMP_DEFLATE:
		return RTE_COMP_ALGO_DEFLATE;
	case SHIM_COMP_LZS:
		return RTE_COMP_ALGO_LZS;
#if RTE_VERSION >= RTE_VERSION_NUM(23, 3, 0, 0)
	case SHIM_COMP_LZ4:
		return RTE_COMP_ALGO_LZ4;
#endif
	default:
		return -1;
	}
}

int shim_comp_capability(uint8_t device, enum shim_comp_algorithm algorithm, struct shim_comp_capability *found)
{
	int number = algorithm_number(algorithm);
	if (number < 0)
		return 0;
	const struct rte_compressdev_capabilities *told =
		rte_compressdev_capability_get(device, (enum rte_comp_algorithm)number);
	if (told == NULL)
		return 0;
	found->features = told->comp_feature_flags;
	found->window_log2_min = told->window_size.min;
	found->window_log2_max = told->window_size.max;
	return 1;
}

int shim_comp_inflate_xform(uint8_t device, uint8_t window_log2, void **xform)
{
	struct rte_comp_xform wanted;
	memset(&wanted, 0, sizeof(wanted));
	wanted.type = RTE_COMP_DECOMPRESS;
	wanted.decompress.algo = RTE_COMP_ALGO_DEFLATE;
	wanted.decompress.chksum = RTE_COMP_CHECKSUM_NONE;
	wanted.decompress.window_size = window_log2;
	wanted.decompress.hash_algo = RTE_COMP_HASH_ALGO_NONE;
	return rte_compressdev_private_xform_create(device, &wanted, xform);
}

void shim_comp_op_set(struct rte_comp_op *op, void *xform, struct rte_mbuf *source, uint32_t offset, uint32_t length,
		      struct rte_mbuf *destination)
{
	op->op_type = RTE_COMP_OP_STATELESS;
	op->private_xform = xform;
	op->m_src = source;
	op->m_dst = destination;
	op->src.offset = offset;
	op->src.length = length;
	op->dst.offset = 0;
	op->flush_flag = RTE_COMP_FLUSH_FINAL;
	op->input_chksum = 0;
	op->output_chksum = 0;
	op->consumed = 0;
	op->produced = 0;
	op->debug_status = 0;
	op->status = RTE_COMP_OP_STATUS_NOT_PROCESSED;
}

uint8_t shim_comp_op_status(const struct rte_comp_op *op) { return op->status; }
uint32_t shim_comp_op_produced(const struct rte_comp_op *op) { return op->produced; }
void **shim_comp_op_user(struct rte_comp_op *op) { return (void **)(op + 1); }

static void keep(void *memory, void *unused)
{
	(void)memory;
	(void)unused;
}

void shim_mbuf_share(struct rte_mbuf_ext_shared_info *shared, uint16_t references)
{
	shared->free_cb = keep;
	shared->fcb_opaque = NULL;
	rte_mbuf_ext_refcnt_set(shared, references);
}

void shim_mbuf_attach(struct rte_mbuf *mbuf, void *memory, uint16_t data_bytes, uint32_t packet_bytes,
		      struct rte_mbuf_ext_shared_info *shared)
{
	rte_pktmbuf_attach_extbuf(mbuf, memory, rte_mem_virt2iova(memory), data_bytes, shared);
	mbuf->data_off = 0;
	mbuf->data_len = data_bytes;
	mbuf->pkt_len = packet_bytes;
}
