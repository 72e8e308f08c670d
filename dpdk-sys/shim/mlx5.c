/* A static libibverbs loads no provider at run time: name the one that the mlx5 drivers need before anything asks for devices. */
#include <stddef.h>
#include <infiniband/verbs.h>

extern const struct verbs_device_ops verbs_provider_mlx5;
void ibv_static_providers(void *unused, ...);

__attribute__((constructor)) static void register_mlx5_provider(void)
{
	ibv_static_providers(NULL, &verbs_provider_mlx5, NULL);
}
