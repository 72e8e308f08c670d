/* What the mlx5 drivers need of a static build, and of GPU memory. */
#include "shim.h"

#include <infiniband/verbs.h>

extern const struct verbs_device_ops verbs_provider_mlx5;
void ibv_static_providers(void *unused, ...);

/* A static libibverbs loads no provider at run time: name the one that the mlx5 drivers need before anything asks for devices. */
__attribute__((constructor)) static void register_mlx5_provider(void)
{
	ibv_static_providers(NULL, &verbs_provider_mlx5, NULL);
}

/* The driver registers memory by its address, of a GPU's too, which the kernel resolves only with the module nvidia_peermem. The build renames its
 * call to this, which hands the kernel the dma-buf that the memory lies in, if there is one, and otherwise, or if that fails, does as it was told. */
struct ibv_mr *shim_ibv_reg_mr_iova2(struct ibv_pd *pd, void *start, size_t bytes, uint64_t iova, unsigned int access)
{
	uint64_t offset;
	const int fd = shim_dma_buf_of(start, bytes, &offset);
	if (fd >= 0) {
		struct ibv_mr *region = ibv_reg_dmabuf_mr(pd, offset, bytes, iova, fd, (int)access);
		if (region != NULL)
			return region;
	}
	return ibv_reg_mr_iova2(pd, start, bytes, iova, access);
}
