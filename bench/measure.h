/* What the measuring programs share: the clock, the way to give up, and pages in guest-like memory.
 */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, KIB = 1024, FILE_SPAN = 64 << 20 }; /* FILE_SPAN: bytes of the data file */

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static inline long check(long result, const char *what) {
    if (result < 0)
        die("%s: %s", what, strerror(errno));
    return result;
}

static inline uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    check(clock_gettime(clock, &now), "clock_gettime");
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* How long the threads of a process waited for a CPU that others had: the sign of a disturbed
 * measurement. 0 where the kernel does not count it. */
__attribute__((unused)) static uint64_t waited_ns(pid_t pid) {
    char path[64];
    uint64_t total = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *threads = opendir(path);
    if (!threads)
        die("%s: %s", path, strerror(errno));
    for (struct dirent *entry; (entry = readdir(threads));) {
        unsigned long long ran, waited;
        char name[512];
        snprintf(name, sizeof name, "%s/%.64s/schedstat", path, entry->d_name);
        FILE *file = fopen(name, "r");
        if (!file)
            continue;
        if (fscanf(file, "%llu %llu", &ran, &waited) == 2)
            total += waited;
        fclose(file);
    }
    closedir(threads);
    return total;
}

/* Shared memory such as a guest's, touched once so that no first fault is measured. */
__attribute__((unused)) static uint8_t *shared_pages(size_t size, int *fd) {
    *fd = (int)check(memfd_create("bench", MFD_CLOEXEC), "memfd_create");
    check(ftruncate(*fd, (off_t)size), "ftruncate");
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    memset(memory, 0x5a, size);
    return memory;
}

#endif
