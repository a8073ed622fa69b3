/*
 * Guest memory: the regions that the front end shared, found by guest physical or by user address.
 * They change only while no ring is running.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
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
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

/* cdef-begin */
typedef struct np_memory np_memory;

enum { NP_REGIONS_MAX = 509 }; /* what KVM leaves to users; vhost-user's GET_MAX_MEM_SLOTS */

static np_memory *np_memory_new(void);
static int np_memory_add(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua, uint64_t offset,
                         int fd);
static int np_memory_remove(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua);
static void np_memory_clear(np_memory *m);
static void np_memory_free(np_memory *m);
static int64_t np_device(int fd);
/* cdef-end */

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Why a page is not there any more. */
enum loss { NOTHING_LOST, TRUNCATED, POISONED };

/* A piece of a file that the front end shares. */
struct shared {
    uint8_t *host;
    uint8_t *map; /* host rounded down to a page, for munmap */
    size_t map_len;
    struct mapping *mapping;
};

struct region {
    uint64_t gpa, ua, size;
    struct shared shared;
};

struct np_memory {
    uint32_t count;
    struct region regions[NP_REGIONS_MAX]; /* sorted by gpa */
    atomic_int lost;                       /* enum loss: of a page of any region */
};

/*
 * A front end can truncate the file behind its memory, and the computer's memory can have an error;
 * touching such a page raises SIGBUS. The handler finds the mapping here, puts a private zero page
 * in the hole and flags the memory, and the ring stops at its next look. A handler may take no
 * lock, so entries are claimed and published by atomics alone.
 */
#define CLAIMED ((uintptr_t)1)

static struct mapping {
    atomic_uintptr_t start, end; /* start: 0 free, CLAIMED being filled in */
    atomic_size_t page;
    _Atomic(atomic_int *) lost;
} mappings[8192];

static struct sigaction previous_sigbus;

static bool patch_hole(uintptr_t at, enum loss why) {
    for (size_t i = 0; i < sizeof(mappings) / sizeof(mappings[0]); i++) {
        struct mapping *entry = &mappings[i];
        uintptr_t start = atomic_load(&entry->start);
        if (start <= CLAIMED || at < start || at >= atomic_load(&entry->end))
            continue;
        size_t page = atomic_load(&entry->page);
        atomic_int *lost = atomic_load(&entry->lost);
        if (atomic_load(&entry->start) != start)
            continue; /* the entry changed hands while we read it */
        void *hole = (void *)(at & ~(page - 1));
        if (mmap(hole, page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
            return false;
        atomic_store(lost, why);
        return true;
    }
    return false;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    bool poisoned = info->si_code == BUS_MCEERR_AR || info->si_code == BUS_MCEERR_AO;
    enum loss why = poisoned ? POISONED : TRUNCATED;
    if (info->si_code <= 0 || !patch_hole((uintptr_t)info->si_addr, why)) {
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
    return r->shared.host + at;
}

/* User addresses matter only when a ring starts: a linear search will do. */
static uint8_t *find_ua(const np_memory *m, uint64_t ua, uint64_t len) {
    for (uint32_t i = 0; i < m->count; i++) {
        const struct region *r = &m->regions[i];
        if (ua - r->ua < r->size && len <= r->size - (ua - r->ua))
            return r->shared.host + (ua - r->ua);
    }
    return NULL;
}

/* The caller made sure that no call on the file can block: fstatfs asks a FUSE server. */
static int map_pages(struct shared *s, uint64_t size, uint64_t offset, int fd, size_t *page) {
    struct stat status;
    struct statfs fs;
    if (fstat(fd, &status) < 0 || fstatfs(fd, &fs) < 0)
        return -errno;
    if (S_ISREG(status.st_mode) && (uint64_t)status.st_size < offset + size)
        return -ENXIO;
    *page = fs.f_type == HUGETLBFS_MAGIC ? (size_t)fs.f_bsize : (size_t)sysconf(_SC_PAGESIZE);
    uint64_t excess = offset & (*page - 1);
    s->map_len = (excess + size + *page - 1) & ~(*page - 1);
    s->map = mmap(NULL, s->map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                  (off_t)(offset - excess));
    if (s->map == MAP_FAILED)
        return -errno;
    s->host = s->map + excess;
    /* Best effort: keep guest RAM out of core dumps and out of children. */
    madvise(s->map, s->map_len, MADV_DONTDUMP);
    madvise(s->map, s->map_len, MADV_DONTFORK);
    return 0;
}

static bool in_a_file(uint64_t size, uint64_t offset) {
    return size && size <= INT64_MAX && offset <= INT64_MAX - size;
}

/* Maps a piece of a file; `lost` is set, to an enum loss, if a page of it is gone. */
static int map_shared(struct shared *s, uint64_t size, uint64_t offset, int fd, atomic_int *lost) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    size_t page;
    if (!in_a_file(size, offset))
        return -EINVAL;
    if (!(s->mapping = claim_mapping()))
        return -ENOSPC;
    pthread_once(&once, install_sigbus_handler);
    int error = map_pages(s, size, offset, fd, &page);
    if (error) {
        atomic_store(&s->mapping->start, 0);
        return error;
    }
    atomic_store(&s->mapping->end, (uintptr_t)s->map + s->map_len);
    atomic_store(&s->mapping->page, page);
    atomic_store(&s->mapping->lost, lost);
    atomic_store(&s->mapping->start, (uintptr_t)s->map);
    return 0;
}

static void unmap_shared(struct shared *s) {
    atomic_store(&s->mapping->start, 0);
    munmap(s->map, s->map_len);
}

static np_memory *np_memory_new(void) { return calloc(1, sizeof(np_memory)); }

/* An equal region is replaced, but only once the new one is there: a failure changes nothing. */
static int np_memory_add(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua, uint64_t offset,
                         int fd) {
    struct region r = {.gpa = gpa, .ua = ua, .size = size}, *equal = NULL;
    if (!in_a_file(size, offset) || gpa + size < gpa || ua + size < ua)
        return -EINVAL;
    for (uint32_t i = 0; i < m->count; i++) {
        struct region *other = &m->regions[i];
        if (other->gpa == gpa && other->size == size && other->ua == ua)
            equal = other;
        else if (overlap(gpa, size, other->gpa, other->size) ||
                 overlap(ua, size, other->ua, other->size))
            return -EEXIST;
    }
    if (!equal && m->count == NP_REGIONS_MAX)
        return -ENOSPC;
    int error = map_shared(&r.shared, size, offset, fd, &m->lost);
    if (error)
        return error;
    if (equal) {
        unmap_shared(&equal->shared);
        *equal = r;
        return 0;
    }
    uint32_t at = m->count++;
    for (; at && m->regions[at - 1].gpa > gpa; at--)
        m->regions[at] = m->regions[at - 1];
    m->regions[at] = r;
    return 0;
}

static int np_memory_remove(np_memory *m, uint64_t gpa, uint64_t size, uint64_t ua) {
    uint32_t at = find(m, gpa);
    struct region *r = &m->regions[at];
    if (at >= m->count || r->gpa != gpa || r->size != size || r->ua != ua)
        return -ENOENT;
    unmap_shared(&r->shared);
    m->count--;
    memmove(r, r + 1, (m->count - at) * sizeof(*r));
    return 0;
}

static void np_memory_clear(np_memory *m) {
    while (m->count)
        unmap_shared(&m->regions[--m->count].shared);
    atomic_store(&m->lost, NOTHING_LOST);
}

static void np_memory_free(np_memory *m) {
    np_memory_clear(m);
    free(m);
}

/* The device number of a file system, which it is not asked for: no attribute is wanted, and FUSE
 * and NFS answer DONT_SYNC from memory (fs/fuse/dir.c, fuse_update_get_attr). */
static int64_t np_device(int fd) {
    struct statx st;
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &st) < 0)
        return -errno;
    return (int64_t)makedev(st.stx_dev_major, st.stx_dev_minor);
}
