/*
 * The split virtqueue of one virtio device, seen from the device. Comes behind _chains.c and
 * _stats.c.
 *
 * Theory of operation. The guest owns all shared memory and may rewrite it at any time. So each
 * descriptor, indirect table and request header is copied once into private memory, and lengths,
 * flags and addresses are checked and used on that copy only. Our own positions live here and are
 * never read back from the guest. Bulk data is not copied by us at all: preadv2 and pwritev2 move
 * it between a file and guest pages, and the kernel turns a bad page into EFAULT.
 *
 * One thread, the device thread, takes requests and publishes used elements. A slot belongs to
 * whoever works on that request, from the batch that np_vring_wait() delivers until
 * np_vring_push() returns it; the bulk functions touch the slot alone, so workers may call them
 * meanwhile. Everything else happens while the ring is stopped, but for np_vring_set_call().
 *
 * A malformed ring stops for good: `broken` says why in one sentence. A malformed request is still
 * delivered, with `fault` set and each of its two byte streams ending at the first hole.
 *
 * Spec: virtio 1.3, sections 2.7 (split virtqueues) and 2.7.7, 2.7.10 (notification suppression).
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

/* cdef-begin */
typedef struct np_vring np_vring;

enum { NP_RING_MAX = 32768, NP_MESSAGE_TYPES = 256 };

/* One request of a batch. fault: 0, or an errno: EFAULT (a buffer outside guest memory), E2BIG (too
 * many segments), EBADMSG (no whole 9P header), ENOMEM. Totals count the bytes before any hole.
 * size, type and tag are what the copied header says, unchecked; 0 if it is not whole. */
typedef struct {
    uint32_t slot, readable, writable, header_len, fault, size, type, tag;
} np_request;

/* One reply, as one number, because Python hands over one four times as fast as four. From the
 * lowest bit: its length (28 bits), how many bytes of it stand in the slot's reply buffer (12), its
 * type (8), the slot (15). If the type is not 0, the first 7 bytes are its 9P header, which is
 * written here: the tag is the request's. */
typedef ssize_t np_done;
enum { NP_USED_BITS = 28, NP_COPY_BITS = 12, NP_TYPE_BITS = 8, NP_SLOT_BITS = 15 };

/* Where the device thread stands, which alone writes it. */
typedef struct {
    uint32_t in_flight;
    uint16_t last_avail, used_index;
} np_counters;

/* Addresses are the front end's user addresses. What the pointers name belongs to the caller and
 * outlives the ring: num * stride bytes of headers and replies, `batch` requests, num of done. */
typedef struct {
    uint32_t num;
    uint64_t desc, used, avail;
    uint16_t base;
    bool event_idx, indirect;
    int kick, call, wake;
    uint32_t header_stride, reply_stride, batch;
    np_watch *watch; /* may be NULL */
    uint8_t *headers, *replies;
    np_request *requests;
    np_done *done;
    np_counters *counters;
    np_stats *stats;
    uint16_t limits[NP_MESSAGE_TYPES]; /* of the header copy, by message type: 7 to header_stride */
} np_vring_config;

static np_vring *np_vring_new(np_memory *m, const np_vring_config *config);
static void np_vring_free(np_vring *v);
static int np_vring_relocate(np_vring *v, np_memory *m);
static bool np_vring_continues(np_vring *v);
static const char *np_vring_broken(np_vring *v);
static void np_vring_set_call(np_vring *v, int fd);
static void np_vring_set_log(np_vring *v, np_log *log, bool log_used, uint64_t used_gpa);
/* cdef-end */

static_assert(sizeof(np_done) == 8, "an np_done takes 63 bits");

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { FLAGS, INDEX, RING }; /* u16 places in the avail and used areas */
enum { USED_RING = 4, USED_ELEMENT = 8 };

/* How np_vring_wait() idles. */
struct idle {
    uint64_t window_ns; /* how long to spin before sleeping */
    uint32_t shut;      /* times that we slept without spinning first */
    uint32_t crowded;   /* times in a row that others ran while we spun */
    uint32_t kicks;     /* in a row that brought nothing */
};

struct np_vring {
    np_vring_config config;
    np_counters *counters;
    np_stats *stats;
    _Atomic uint16_t *avail, *used; /* NULL: not in guest memory */
    _Atomic uint32_t *used_ring;    /* id, len */
    bool unlocated;                 /* guest memory holds its parts no more, but may again */
    bool log_used;
    uint64_t used_gpa; /* where the log has the used ring */
    atomic_int call, call_kind;
    bool called;         /* a notify decision has been made... */
    uint16_t call_index; /* ...and this was the used index then */
    struct idle idle;
    atomic_bool woken, asleep;
    uint64_t alarm_ns;  /* of CLOCK_MONOTONIC; 0: none */
    struct slot *slots; /* those from `fresh` on were never used */
    uint16_t *resting;  /* a stack of those that were, and are not */
    uint32_t fresh, rested;
    bool *taken; /* by head: is it in flight? */
    struct chains chains;
};

static bool lost(np_vring *v) {
    static const char *const reasons[] = {
        [TRUNCATED] = "guest memory vanished: the front end truncated the file behind it",
        [POISONED] = "guest memory vanished: an uncorrectable error of this computer's memory",
    };
    int why = atomic_load(&v->chains.memory->lost);
    return why != NOTHING_LOST && broken(&v->chains, "%s", reasons[why]);
}

static uint16_t load16(_Atomic uint16_t *p, memory_order order) {
    return le16toh(atomic_load_explicit(p, order));
}

static void store16(_Atomic uint16_t *p, uint16_t value, memory_order order) {
    atomic_store_explicit(p, htole16(value), order);
}

/* ---- Where the ring lies ---- */

static uint8_t *locate(struct chains *c, const char *what, unsigned long long ua, uint64_t len,
                       uint32_t align) {
    uint8_t *host = find_ua(c->memory, ua, len);
    if (!host)
        broken(c, "the %s at 0x%llx is not inside one of the %u memory regions", what, ua,
               c->memory->count);
    else if (((uintptr_t)host | ua) % align)
        broken(c, "the %s at 0x%llx is not aligned to %u bytes", what, ua, align);
    else
        return host;
    return NULL;
}

static int locate_ring(np_vring *v) {
    const np_vring_config *config = &v->config;
    struct chains *c = &v->chains;
    uint64_t event = config->event_idx ? 2 : 0, desc_len = 16ull * config->num,
             avail_len = 4 + 2ull * config->num + event, used_len = 4 + 8ull * config->num + event;
    uint8_t *desc, *avail, *used;
    v->used = NULL;
    if (!(desc = locate(c, "descriptor table", config->desc, desc_len, 16)) ||
        !(avail = locate(c, "available ring", config->avail, avail_len, 2)) ||
        !(used = locate(c, "used ring", config->used, used_len, 4)))
        return -1;
    if (overlap(config->desc, desc_len, config->avail, avail_len) ||
        overlap(config->desc, desc_len, config->used, used_len) ||
        overlap(config->avail, avail_len, config->used, used_len))
        return broken(c, "the descriptor table, available ring and used ring overlap");
    c->desc = (_Atomic uint64_t *)desc;
    v->avail = (_Atomic uint16_t *)avail;
    v->used = (_Atomic uint16_t *)used;
    v->used_ring = (_Atomic uint32_t *)(used + USED_RING);
    return 0;
}

/* After guest memory changed, or became another: the ring and all that is in flight is found anew.
 * -1: the ring is broken, or not there; then another change may bring it back. */
static int np_vring_relocate(np_vring *v, np_memory *m) {
    struct chains *c = &v->chains;
    c->memory = m;
    c->hint = 0;
    for (uint32_t i = 0; i < v->fresh; i++)
        if (v->slots[i].in_flight)
            relocate_slot(c, &v->slots[i]);
    if (v->unlocated) {
        c->broken[0] = '\0';
    } else if (c->broken[0]) { /* for good, by the guest: where it lay, there may be nothing now */
        v->used = NULL;
        return -1;
    }
    v->unlocated = locate_ring(v) < 0;
    return v->unlocated ? -1 : 0;
}

/* Does the used ring stand where we left it? Otherwise the guest has begun a new one there. */
static bool np_vring_continues(np_vring *v) {
    return v->used && load16(&v->used[INDEX], memory_order_relaxed) == v->counters->used_index;
}

/* ---- Life ---- */

static bool allocate_slots(np_vring *v, uint32_t num) {
    v->slots = calloc(num, sizeof(*v->slots));
    v->resting = calloc(num, sizeof(*v->resting));
    v->taken = calloc(num, sizeof(*v->taken));
    return v->slots && v->resting && v->taken;
}

/* NULL only for want of memory; a ring that cannot work comes back broken. */
static np_vring *np_vring_new(np_memory *m, const np_vring_config *config) {
    uint32_t num = config->num;
    bool valid = num && num <= NP_RING_MAX && !(num & (num - 1));
    np_vring *v = calloc(1, sizeof(*v));
    if (!v || (valid && !allocate_slots(v, num))) {
        if (v)
            np_vring_free(v);
        return NULL;
    }
    v->config = *config;
    v->counters = config->counters;
    v->stats = config->stats;
    v->counters->last_avail = config->base;
    v->chains.memory = m;
    v->chains.num = num;
    v->chains.indirect = config->indirect;
    v->chains.segments_max = num > SEGMENTS_MIN ? num : SEGMENTS_MIN;
    np_vring_set_call(v, config->call);
    if (!valid)
        broken(&v->chains, "a ring of %u entries: not a power of two up to %d", num, NP_RING_MAX);
    else if (locate_ring(v) == 0)
        /* The guest's copy counts only here: a resumed ring goes on where it was left. */
        v->counters->used_index = load16(&v->used[INDEX], memory_order_relaxed);
    return v;
}

static void np_vring_free(np_vring *v) {
    for (uint32_t i = 0; i < v->fresh; i++)
        free(v->slots[i].segments);
    free(v->slots);
    free(v->resting);
    free(v->taken);
    free(v);
}

static const char *np_vring_broken(np_vring *v) { return v->chains.broken; }

/* While the device thread runs, too: who replaces what a descriptor names keeps its number (dup2),
 * and a signal of the old kind on the new one is at worst lost; so the caller signals once. */
static void np_vring_set_call(np_vring *v, int fd) {
    atomic_store(&v->call, fd);
    atomic_store(&v->call_kind, signal_kind(fd));
}

/* `used_gpa` counts if the front end wants to know of writes to the used ring, too. */
static void np_vring_set_log(np_vring *v, np_log *log, bool log_used, uint64_t used_gpa) {
    v->chains.log = log;
    v->log_used = log_used;
    v->used_gpa = used_gpa;
}

static void mark_used(np_vring *v, uint64_t offset, uint64_t len) {
    if (v->chains.log && v->log_used)
        mark_dirty(v->chains.log, v->used_gpa + offset, len);
}
