/*
 * Privileges that a process gives up for good (capabilities(7)), before it has other threads: what
 * they are is a matter of each thread.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef-begin */
int nd_keep_only(uint64_t capabilities);
/* cdef-end */

enum { ND_CAPABILITIES = 64 };

/* Locked, so that neither a program that is executed nor a change of user brings any back. A guest
 * user's fsuid takes none away: the guest's kernel has checked permissions, and a second check here
 * would not know that user's groups. */
static const unsigned long nd_secure_bits =
    SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED |
    SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

static int nd_lock_privileges(uint64_t keep) {
    for (unsigned long bit = 0; bit < ND_CAPABILITIES; bit++)
        if (!(keep >> bit & 1) && prctl(PR_CAPBSET_READ, bit, 0, 0, 0) == 1 &&
            prctl(PR_CAPBSET_DROP, bit, 0, 0, 0) < 0)
            return -errno;
    int bits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0); /* of which some may be locked already */
    if (bits < 0 || prctl(PR_SET_SECUREBITS, (unsigned long)bits | nd_secure_bits, 0, 0, 0) < 0)
        return -errno;
    return 0;
}

/* Of what there is, the process keeps these and never gets others. What needs CAP_SETPCAP is left
 * out without it: then there are hardly any to lose. */
int nd_keep_only(uint64_t keep) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 ||
        syscall(SYS_capget, &head, data) < 0)
        return -errno;
    int error = 0;
    if (data[0].effective >> CAP_SETPCAP & 1)
        error = nd_lock_privileges(keep);
    if (error)
        return error;
    for (int half = 0; half < _LINUX_CAPABILITY_U32S_3; half++) {
        data[half].permitted &= (uint32_t)(keep >> (32 * half));
        data[half].effective = data[half].permitted;
        data[half].inheritable = 0;
    }
    return syscall(SYS_capset, &head, data) < 0 ? -errno : 0;
}
