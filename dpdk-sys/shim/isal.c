/* Debian ships ISA-L as a shared library only. Naming it as a dependency would stop the binary from starting on a machine
 * without it, so the seven functions that DPDK's compress_isal driver calls look it up when first called. Without the library
 * they report failure, and shim_isal_available() says so beforehand. SHIM_ISAL_CALLS: that driver is linked in.
 *
 * isal_inflate does one thing more. Given a Deflate stream that ends too early, in a chain of mbufs, the driver calls it again and again with
 * nothing to read, for ever: the lcore would hang on bytes that somebody sent. Here a second call in a row that has nothing to read and
 * changes nothing fails. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

int shim_isal_available(void);

#ifdef SHIM_ISAL_CALLS
void isal_deflate_init(void *stream);
int isal_deflate_set_hufftables(void *stream, void *tables, int type);
int isal_deflate(void *stream);
int isal_deflate_stateless(void *stream);
void isal_inflate_init(void *state);
int isal_inflate(void *state);
int isal_inflate_stateless(void *state);
#endif

#define ISAL_INVALID_OPERATION (-9) /* isa-l/igzip_lib.h */
#define ISAL_INVALID_BLOCK (-1)

static void *isal_symbol(const char *name)
{
	static void *library; /* the loader counts references and locks: a race here opens it twice and nothing else */
	void *handle = __atomic_load_n(&library, __ATOMIC_ACQUIRE);
	if (handle == NULL) {
		handle = dlopen("libisal.so.2", RTLD_NOW | RTLD_LOCAL);
		if (handle == NULL)
			return NULL;
		__atomic_store_n(&library, handle, __ATOMIC_RELEASE);
	}
	return dlsym(handle, name);
}

int shim_isal_available(void) { return isal_symbol("isal_deflate") != NULL; }

#ifdef SHIM_ISAL_CALLS
#define RESOLVE(type, name)                                                    \
	static type found;                                                     \
	type call = __atomic_load_n(&found, __ATOMIC_RELAXED);                 \
	if (call == NULL) {                                                    \
		call = (type)isal_symbol(name);                                \
		__atomic_store_n(&found, call, __ATOMIC_RELAXED);              \
	}

typedef void (*init_call)(void *);
typedef int (*run_call)(void *);
typedef int (*tables_call)(void *, void *, int);

#define INIT(name)                                                             \
	void name(void *state)                                                 \
	{                                                                      \
		RESOLVE(init_call, #name)                                      \
		if (call != NULL)                                              \
			call(state);                                           \
	}
#define RUN(name, failure)                                                     \
	int name(void *state)                                                  \
	{                                                                      \
		RESOLVE(run_call, #name)                                       \
		return call != NULL ? call(state) : (failure);                 \
	}

INIT(isal_deflate_init)
INIT(isal_inflate_init)
RUN(isal_deflate, ISAL_INVALID_OPERATION)
RUN(isal_deflate_stateless, ISAL_INVALID_OPERATION)
RUN(isal_inflate_stateless, ISAL_INVALID_BLOCK)

/* The front of ISA-L's struct inflate_state, the same since 2.17. */
struct inflate_front {
	uint8_t *next_out;
	uint32_t avail_out;
	uint32_t total_out;
	uint8_t *next_in;
	uint64_t read_in;
	uint32_t avail_in;
	int32_t read_in_length;
};

int isal_inflate(void *state)
{
	static __thread const void *stuck; /* the state that the last call on this thread left as it was */
	RESOLVE(run_call, "isal_inflate")
	if (call == NULL)
		return ISAL_INVALID_BLOCK;
	struct inflate_front *front = state;
	const struct inflate_front before = *front;
	int result = call(state);
	if (before.avail_in != 0 || front->total_out != before.total_out ||
	    front->read_in_length != before.read_in_length) {
		stuck = NULL;
		return result;
	}
	if (stuck == state) {
		stuck = NULL;
		return ISAL_INVALID_BLOCK;
	}
	stuck = state;
	return result;
}

int isal_deflate_set_hufftables(void *stream, void *tables, int type)
{
	RESOLVE(tables_call, "isal_deflate_set_hufftables")
	return call != NULL ? call(stream, tables, type) : ISAL_INVALID_OPERATION;
}
#endif
