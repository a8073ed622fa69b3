/*
 * What a process shows of itself to the host's administrator.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

/* cdef-begin */
int nd_name_process(const char *name);
/* cdef-end */

enum { ND_STAT_SIZE = 1024, ND_ARG_START = 48 }; /* proc(5), /proc/pid/stat; arg_end is next */

/* The memory that ps(1) shows as the command line; -errno if the kernel does not tell. */
static int nd_argument_area(char **start, char **end) {
    char stat[ND_STAT_SIZE];
    FILE *file = fopen("/proc/self/stat", "re");
    if (!file)
        return -errno;
    size_t size = fread(stat, 1, sizeof stat - 1, file);
    fclose(file);
    stat[size] = 0;
    char *at = strrchr(stat, ')'); /* the second field may hold anything */
    for (int field = 2; at && field < ND_ARG_START; field++)
        at = strchr(at + 1, ' ');
    uint64_t first, last;
    if (!at || sscanf(at, " %" SCNu64 " %" SCNu64, &first, &last) != 2 || !first || last <= first)
        return -EPERM;
    *start = (char *)(uintptr_t)first;
    *end = (char *)(uintptr_t)last;
    return 0;
}

/* Call the process `name`, as far as the space of its command line reaches, and the calling thread
 * its first 15 bytes. PR_SET_MM_ARG_START would need CAP_SYS_RESOURCE; the area itself is ours, and
 * CPython has copied what it needs of it. */
int nd_name_process(const char *name) {
    char *start, *end;
    if (prctl(PR_SET_NAME, name) < 0)
        return -errno;
    int error = nd_argument_area(&start, &end);
    if (error < 0)
        return error;
    size_t room = (size_t)(end - start), size = strnlen(name, room - 1);
    memset(start, 0,
           room); /* a last byte of 0 keeps the kernel from reading on (proc_pid_cmdline) */
    memcpy(start, name, size);
    return 0;
}
