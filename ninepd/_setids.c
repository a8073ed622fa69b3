/*
 * Whether what a thread does leaves setuid and setgid bits in place: by the capability CAP_FSETID,
 * which each thread has for itself (capabilities(7)).
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/capability.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef-begin */
int nd_keep_set_ids(int keep);
/* cdef-end */

/* Whether setuid and setgid bits outlive what this thread writes, or go as when an ordinary user
 * writes: that is CAP_FSETID (capabilities(7)), which a thread without it never has. */
int nd_keep_set_ids(int keep) {
    static _Thread_local int kept = -1;
    if (kept == keep)
        return 0;
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    if (syscall(SYS_capget, &head, data) < 0)
        return -errno;
    data[0].effective &= ~(1U << CAP_FSETID);
    if (keep)
        data[0].effective |= data[0].permitted & 1U << CAP_FSETID;
    if (syscall(SYS_capset, &head, data) < 0)
        return -errno;
    kept = keep;
    return 0;
}
