/* Linked in place of isal.c when the compress_isal driver is left out. */
int shim_isal_available(void);
int shim_isal_available(void) { return 0; }
