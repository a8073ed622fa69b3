/*
 * Guest memory: the regions that the front end shared, found by guest physical or by user address.
 * They change only while no ring is running.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* cdef-begin */
typedef struct np_memory np_memory;

static np_memory *np_memory_new(void);
static int np_memory_add(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua, uint64_t offset,
                         int fd);
static int np_memory_remove(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua);
static void np_memory_clear(np_memory *m);
static void np_memory_free(np_memory *m);
/* cdef-end */

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

#define REGIONS_MAX 509 /* what vhost-user's GET_MAX_MEM_SLOTS promises */

struct region {
    uint64_t gpa, ua, size;
    uint8_t *host;
    uint8_t *map; /* host rounded down to a page, for munmap */
    size_t map_len;
    struct mapping *mapping;
};

struct np_memory {
    uint32_t count;
    struct region regions[REGIONS_MAX]; /* sorted by gpa */
    atomic_bool lost;                   /* the front end truncated the file behind a region */
};

/*
 * A front end can truncate the file behind its memory; touching such a page raises SIGBUS. The
 * handler finds the mapping here, puts a private zero page in the hole and flags the memory, and
 * the ring stops at its next look. A handler may take no lock, so entries are claimed and
 * published by atomics alone.
 */
#define CLAIMED ((uintptr_t)1)

static struct mapping {
    atomic_uintptr_t start, end; /* start: 0 free, CLAIMED being filled in */
    atomic_size_t page;
    _Atomic(atomic_bool *) lost;
} mappings[8192];

static struct sigaction previous_sigbus;

static bool patch_hole(uintptr_t at) {
    for (size_t i = 0; i < sizeof(mappings) / sizeof(mappings[0]); i++) {
        struct mapping *entry = &mappings[i];
        uintptr_t start = atomic_load(&entry->start);
        if (start <= CLAIMED || at < start || at >= atomic_load(&entry->end))
            continue;
        size_t page = atomic_load(&entry->page);
        atomic_bool *lost = atomic_load(&entry->lost);
        if (atomic_load(&entry->start) != start)
            continue; /* the entry changed hands while we read it */
        void *hole = (void *)(at & ~(page - 1));
        if (mmap(hole, page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
            return false;
        atomic_store(lost, true);
        return true;
    }
    return false;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    if (info->si_code <= 0 || !patch_hole((uintptr_t)info->si_addr)) {
        /* Not ours: the old disposition gets it, by the same instruction faulting again. */
        sigaction(number, &previous_sigbus, NULL);
        if (info->si_code <= 0)
            raise(number);
    }
    errno = saved;
}

static void install_sigbus_handler(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGBUS, &action, &previous_sigbus);
}

static struct mapping *claim_mapping(void) {
    for (size_t i = 0; i < sizeof(mappings) / sizeof(mappings[0]); i++) {
        uintptr_t expected = 0;
        if (atomic_compare_exchange_strong(&mappings[i].start, &expected, CLAIMED))
            return &mappings[i];
    }
    return NULL;
}

static bool overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len) {
    return a - b < b_len || b - a < a_len;
}

/* The last region that starts at or below gpa; the first if none does. */
static uint32_t find(const np_memory *m, uint64_t gpa) {
    uint32_t low = 0, high = m->count;
    while (low + 1 < high) {
        uint32_t middle = (low + high) / 2;
        if (m->regions[middle].gpa <= gpa)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/*
 * The host address of a guest buffer, and in *len how many of its bytes lie together there. The
 * hint is the caller's last hit: a private one per ring needs no atomics.
 */
static uint8_t *resolve(const np_memory *m, uint64_t gpa, uint64_t *len, uint32_t *hint) {
    if (*hint >= m->count || gpa - m->regions[*hint].gpa >= m->regions[*hint].size)
        *hint = find(m, gpa);
    const struct region *r = &m->regions[*hint];
    if (*hint >= m->count || gpa - r->gpa >= r->size)
        return NULL;
    uint64_t at = gpa - r->gpa;
    *len = min(*len, r->size - at);
    return r->host + at;
}

/* User addresses matter only when a ring starts: a linear search will do. */
static uint8_t *find_ua(const np_memory *m, uint64_t ua, uint64_t len) {
    for (uint32_t i = 0; i < m->count; i++) {
        const struct region *r = &m->regions[i];
        if (ua - r->ua < r->size && len <= r->size - (ua - r->ua))
            return r->host + (ua - r->ua);
    }
    return NULL;
}

static np_memory *np_memory_new(void) { return calloc(1, sizeof(np_memory)); }

static int map_region(struct region *r, uint64_t offset, int fd, size_t *page) {
    struct stat status;
    struct statfs fs;
    if (fstat(fd, &status) < 0 || fstatfs(fd, &fs) < 0)
        return -errno;
    if (S_ISREG(status.st_mode) && (uint64_t)status.st_size < offset + r->size)
        return -ENXIO;
    *page = fs.f_type == HUGETLBFS_MAGIC ? (size_t)fs.f_bsize : (size_t)sysconf(_SC_PAGESIZE);
    uint64_t excess = offset & (*page - 1);
    r->map_len = (excess + r->size + *page - 1) & ~(*page - 1);
    r->map = mmap(NULL, r->map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                  (off_t)(offset - excess));
    if (r->map == MAP_FAILED)
        return -errno;
    r->host = r->map + excess;
    /* Best effort: keep guest RAM out of core dumps and out of children. */
    madvise(r->map, r->map_len, MADV_DONTDUMP);
    madvise(r->map, r->map_len, MADV_DONTFORK);
    return 0;
}

static int np_memory_add(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua, uint64_t offset,
                         int fd) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct region r = {.gpa = gpa, .ua = ua, .size = size};
    size_t page;
    if (size == 0 || gpa + size < gpa || ua + size < ua || size > INT64_MAX ||
        offset > INT64_MAX - size)
        return -EINVAL;
    for (uint32_t i = 0; i < m->count; i++)
        if (overlap(gpa, size, m->regions[i].gpa, m->regions[i].size) ||
            overlap(ua, size, m->regions[i].ua, m->regions[i].size))
            return -EEXIST;
    if (m->count == REGIONS_MAX || !(r.mapping = claim_mapping()))
        return -ENOSPC;
    pthread_once(&once, install_sigbus_handler);
    int error = map_region(&r, offset, fd, &page);
    if (error) {
        atomic_store(&r.mapping->start, 0);
        return error;
    }
    atomic_store(&r.mapping->end, (uintptr_t)r.map + r.map_len);
    atomic_store(&r.mapping->page, page);
    atomic_store(&r.mapping->lost, &m->lost);
    atomic_store(&r.mapping->start, (uintptr_t)r.map);
    uint32_t at = m->count++;
    for (; at && m->regions[at - 1].gpa > gpa; at--)
        m->regions[at] = m->regions[at - 1];
    m->regions[at] = r;
    return 0;
}

static void unmap_region(struct region *r) {
    atomic_store(&r->mapping->start, 0);
    munmap(r->map, r->map_len);
}

static int np_memory_remove(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua) {
    uint32_t at = find(m, gpa);
    struct region *r = &m->regions[at];
    if (at >= m->count || r->gpa != gpa || r->size != size || r->ua != ua)
        return -ENOENT;
    unmap_region(r);
    m->count--;
    memmove(r, r + 1, (m->count - at) * sizeof(*r));
    return 0;
}

static void np_memory_clear(np_memory *m) {
    while (m->count)
        unmap_region(&m->regions[--m->count]);
    atomic_store(&m->lost, false);
}

static void np_memory_free(np_memory *m) {
    np_memory_clear(m);
    free(m);
}
