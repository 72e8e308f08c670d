/* libpcap can capture from D-Bus, and its static library so asks for libdbus and libsystemd, which Debian cannot link statically;
 * newer ones ask for libibverbs in the same way. net_pcap wants neither. Defining these entry points of libpcap's table of
 * capture sources here keeps those members of the archive, and their libraries, out of the binary: no such device is ever found. */
#include <stddef.h>

void *dbus_create(const char *device, char *error, int *is_ours);
int dbus_findalldevs(void *list, char *error);
void *rdmasniff_create(const char *device, char *error, int *is_ours);
int rdmasniff_findalldevs(void *list, char *error);

void *dbus_create(const char *device, char *error, int *is_ours)
{
	(void)device;
	(void)error;
	*is_ours = 0;
	return NULL;
}

int dbus_findalldevs(void *list, char *error)
{
	(void)list;
	(void)error;
	return 0;
}

void *rdmasniff_create(const char *device, char *error, int *is_ours) { return dbus_create(device, error, is_ours); }
int rdmasniff_findalldevs(void *list, char *error) { return dbus_findalldevs(list, error); }
