/* Shared-memory ports (net_memif) whose peer comes and goes.
 *
 * EAL's interrupt thread handles what a memif peer says, and when the peer has left it unmaps the rings shared with it, whether or not an
 * lcore is in the midst of a burst over them: a killed peer takes a busy process along with a SIGSEGV. And a client connects once, when
 * its device is started: if its server is not there, or goes, it stays alone.
 *
 * So bursts on these ports go through a gate. The build renames the driver's calls of munmap to shim_memif_unmap below, which waits until
 * no lcore is inside; the driver has by then marked the port as not connected, so that whoever enters later turns back at once.
 * Starting, restarting and closing a device is done on the interrupt thread too, where nothing of the driver runs at the same time.
 *
 * What is done for zero-copy=yes is in memif_zero_copy.c.
 *
 * Closing a server, the driver frees what the interrupt thread knows its listening socket by, and goes on listening: two more renamed
 * calls see to that. With the shared libdpdk nothing is renamed, and these dangers stay. */
#include "memif.h"
#include "shim.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <rte_alarm.h>
#include <rte_interrupts.h>

/* One for each direction of each queue of each port: a memif has at most 255. */
#define SLOTS (RTE_MAX_ETHPORTS * 512)
#define RETRY_US 100000
/* Times RETRY_US that a peer which answered has to finish the handshake. */
#define PATIENCE 5

/* Whether a lcore is inside a burst. A queue's direction is one thread's, so that a plain store is enough to leave: a locked instruction waits
 * until all that was copied into the shared memory has left the core. */
static struct {
	_Alignas(64) unsigned int inside;
} slots[SLOTS];

/* Nobody may enter: threads that wait for the lcores to leave, and per port whether its device is not started. */
static unsigned int waiting;
static bool closed[RTE_MAX_ETHPORTS];

/* Of a client's port: how many more times its handshake is waited for, and whether its mbufs are the shared memory. Used on the interrupt
 * thread only. */
static unsigned int patience[RTE_MAX_ETHPORTS];
static bool zero_copy[RTE_MAX_ETHPORTS];

static inline unsigned int slot_of(uint16_t port, uint16_t queue, unsigned int direction)
{
	return (port * 512u + queue * 2u + direction) % SLOTS;
}

static inline bool enter(uint16_t port, unsigned int slot)
{
	__atomic_exchange_n(&slots[slot].inside, 1, __ATOMIC_SEQ_CST);
	if (!__atomic_load_n(&closed[port], __ATOMIC_SEQ_CST) && __atomic_load_n(&waiting, __ATOMIC_SEQ_CST) == 0)
		return true;
	__atomic_store_n(&slots[slot].inside, 0, __ATOMIC_RELEASE);
	return false;
}

static inline void leave(unsigned int slot) { __atomic_store_n(&slots[slot].inside, 0, __ATOMIC_RELEASE); }

static void wait_for_lcores(void)
{
	__atomic_fetch_add(&waiting, 1, __ATOMIC_SEQ_CST);
	for (unsigned int slot = 0; slot < SLOTS; slot++)
		while (__atomic_load_n(&slots[slot].inside, __ATOMIC_SEQ_CST) != 0)
			sched_yield();
	__atomic_fetch_sub(&waiting, 1, __ATOMIC_SEQ_CST);
}

uint16_t shim_memif_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	unsigned int slot = slot_of(port, queue, 0);
	if (!enter(port, slot))
		return 0;
	uint16_t count = rte_eth_rx_burst(port, queue, mbufs, n);
	leave(slot);
	return count;
}

uint16_t shim_memif_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	unsigned int slot = slot_of(port, queue, 1);
	if (!enter(port, slot))
		return 0;
	uint16_t count = rte_eth_tx_burst(port, queue, mbufs, n);
	leave(slot);
	/* With zero-copy=yes the driver says 65535 when the connection ended under it: it has the mbufs by then. */
	return count > n ? n : count;
}

/* What the driver calls in place of munmap, before it frees anything of a region. */
int shim_memif_unmap(void *address, size_t length);
int shim_memif_unmap(void *address, size_t length)
{
	wait_for_lcores();
	shim_memif_empty(address, length);
	return munmap(address, length);
}

/* Listening sockets that the interrupt thread watches. */
#define LISTENERS 64
static struct {
	const struct rte_intr_handle *handle;
	rte_intr_callback_fn call;
	void *argument;
} listeners[LISTENERS];
static pthread_mutex_t listeners_lock = PTHREAD_MUTEX_INITIALIZER;

static bool is_listening(int fd)
{
	int listening = 0;
	socklen_t size = sizeof(listening);
	return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening;
}

/* What the driver calls in place of rte_intr_callback_register. Without room the listener is not remembered, as with the driver alone. */
int shim_memif_register(const struct rte_intr_handle *handle, rte_intr_callback_fn call, void *argument);
int shim_memif_register(const struct rte_intr_handle *handle, rte_intr_callback_fn call, void *argument)
{
	int result = rte_intr_callback_register(handle, call, argument);
	if (result != 0 || !is_listening(rte_intr_fd_get(handle)))
		return result;
	pthread_mutex_lock(&listeners_lock);
	for (int index = 0; index < LISTENERS; index++) {
		if (listeners[index].handle == NULL) {
			listeners[index].handle = handle;
			listeners[index].call = call;
			listeners[index].argument = argument;
			break;
		}
	}
	pthread_mutex_unlock(&listeners_lock);
	return result;
}

/* What the driver calls in place of rte_intr_instance_free. Handles of connections are not touched: the caller may hold EAL's lock. */
void shim_memif_intr_free(struct rte_intr_handle *handle);
void shim_memif_intr_free(struct rte_intr_handle *handle)
{
	pthread_mutex_lock(&listeners_lock);
	for (int index = 0; handle != NULL && index < LISTENERS; index++) {
		if (listeners[index].handle != handle)
			continue;
		/* -EAGAIN: it is being called. */
		while (rte_intr_callback_unregister(handle, listeners[index].call, listeners[index].argument) == -EAGAIN)
			sched_yield();
		close(rte_intr_fd_get(handle));
		listeners[index].handle = NULL;
	}
	pthread_mutex_unlock(&listeners_lock);
	rte_intr_instance_free(handle);
}

/* A piece of work for the interrupt thread, and its outcome. */
struct work {
	uint16_t port;
	int result;
	bool done;
};

/* Runs `call` on the interrupt thread and waits for it. */
static int on_interrupt_thread(rte_eal_alarm_callback call, uint16_t port)
{
	struct work work = { .port = port };
	int result = rte_eal_alarm_set(1, call, &work);
	if (result != 0)
		return result;
	const struct timespec moment = { .tv_nsec = 100000 };
	while (!__atomic_load_n(&work.done, __ATOMIC_ACQUIRE))
		nanosleep(&moment, NULL);
	return work.result;
}

/* Starts the device. A client whose server is not there fails, which is no error: it is said in the log of every attempt, so be quiet. */
static int start(uint16_t port)
{
	int type = rte_log_register("pmd.net.memif");
	int level = type < 0 ? -1 : rte_log_get_level((uint32_t)type);
	if (level >= 0)
		rte_log_set_level((uint32_t)type, RTE_LOG_CRIT);
	int result = rte_eth_dev_start(port);
	if (level >= 0)
		rte_log_set_level((uint32_t)type, (uint32_t)level);
	patience[port] = result == 0 ? PATIENCE : 0;
	if (result == 0 && zero_copy[port])
		shim_memif_watch(port);
	if (result == 0)
		__atomic_store_n(&closed[port], false, __ATOMIC_SEQ_CST);
	return result;
}

static void stop(uint16_t port)
{
	__atomic_store_n(&closed[port], true, __ATOMIC_SEQ_CST);
	wait_for_lcores();
	rte_eth_dev_stop(port);
}

static void *port_argument(uint16_t port) { return (void *)(uintptr_t)(port + 1u); }

/* Every RETRY_US: a client without a server tries again. */
static void retry(void *argument)
{
	uint16_t port = (uint16_t)((uintptr_t)argument - 1u);
	if (shim_link_up(port) == 1) {
		patience[port] = 0;
	} else if (patience[port] > 0) {
		patience[port]--;
	} else {
		stop(port);
		start(port);
	}
	rte_eal_alarm_set(RETRY_US, retry, argument);
}

static void start_work(void *argument)
{
	struct work *work = argument;
	work->result = start(work->port);
	__atomic_store_n(&work->done, true, __ATOMIC_RELEASE);
}

static void close_work(void *argument)
{
	struct work *work = argument;
	stop(work->port);
	shim_memif_unwatch(work->port);
	work->result = rte_eth_dev_close(work->port);
	__atomic_store_n(&work->done, true, __ATOMIC_RELEASE);
}

int shim_memif_start(uint16_t port, int is_client, int is_zero_copy)
{
	__atomic_store_n(&closed[port], true, __ATOMIC_SEQ_CST);
	zero_copy[port] = is_zero_copy;
	int result = on_interrupt_thread(start_work, port);
	return is_client ? rte_eal_alarm_set(RETRY_US, retry, port_argument(port)) : result;
}

void shim_memif_close(uint16_t port)
{
	/* Waits for one that is running, which would set the next. */
	do
		rte_errno = 0;
	while (rte_eal_alarm_cancel(retry, port_argument(port)) > 0 || rte_errno == EINPROGRESS);
	if (on_interrupt_thread(close_work, port) == -ENOMEM) {
		shim_memif_unwatch(port);
		rte_eth_dev_close(port);
	}
}
