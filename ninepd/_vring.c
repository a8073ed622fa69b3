/*
 * The split virtqueue of one virtio device, seen from the device. Comes behind _chains.c.
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
#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* cdef-begin */
typedef struct np_vring np_vring;

enum { NP_RING_MAX = 32768, NP_MESSAGE_TYPES = 256 };

/* One request of a batch. fault: 0, or an errno: EFAULT (a buffer outside guest memory), E2BIG (too
 * many segments), EBADMSG (no whole 9P header), ENOMEM. Totals count the bytes before any hole.
 * size, type and tag are what the copied header says, unchecked; 0 if it is not whole. */
typedef struct {
    uint32_t slot, readable, writable, header_len, fault, size, type, tag;
} np_request;

/* One reply: `copy_len` bytes of the slot's reply buffer, of `used_len` in all. If `type` is not 0,
 * the first 7 bytes are its 9P header, which is written here: the tag is the request's. */
typedef struct {
    uint32_t slot, type, copy_len, used_len;
} np_done;

/* Written by the device thread, read by anybody. */
typedef struct {
    uint64_t requests, batches, kicks, calls, sleeps, spin_hits;
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
    uint16_t limits[NP_MESSAGE_TYPES]; /* of the header copy, by message type: 7 to header_stride */
} np_vring_config;

static np_vring *np_vring_new(np_memory *m, const np_vring_config *config);
static void np_vring_free(np_vring *v);
static int np_vring_relocate(np_vring *v, np_memory *m);
static bool np_vring_continues(np_vring *v);
static const char *np_vring_broken(np_vring *v);
static void np_vring_set_call(np_vring *v, int fd);
static void np_vring_set_log(np_vring *v, np_log *log, bool log_used, uint64_t used_gpa);
static int np_vring_push(np_vring *v, uint32_t count);
static int np_vring_copy(np_vring *v, int stream, uint32_t slot, uint64_t skip, uint8_t *data,
                         uint64_t len);
static int64_t np_vring_move(np_vring *v, int stream, uint32_t slot, uint64_t skip, int fd,
                             uint64_t count, int64_t offset, int flags);
/* cdef-end */

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { PREFIX = 7, TYPE = 4, TAG = 5 }; /* of a 9P message: size[4] type[1] tag[2] */
enum { FLAGS, INDEX, RING };            /* u16 places in the avail and used areas */
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
    _Atomic uint16_t *avail, *used;
    _Atomic uint32_t *used_ring; /* id, len */
    bool unlocated;              /* guest memory holds its parts no more */
    bool log_used;
    uint64_t used_gpa; /* where the log has the used ring */
    atomic_int call, call_kind;
    bool called;         /* a notify decision has been made... */
    uint16_t call_index; /* ...and this was the used index then */
    struct idle idle;
    atomic_bool woken, asleep;
    struct slot *slots; /* those from `fresh` on were never used */
    uint16_t *resting;  /* a stack of those that were, and are not */
    uint32_t fresh, rested;
    bool *taken; /* by head: is it in flight? */
    struct chains chains;
};

static bool lost(np_vring *v) {
    return atomic_load(&v->chains.memory->lost) &&
           broken(&v->chains, "guest memory vanished: the front end truncated the file behind it");
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
    if (v->unlocated)
        c->broken[0] = '\0';
    else if (c->broken[0])
        return -1;
    v->unlocated = locate_ring(v) < 0;
    return v->unlocated ? -1 : 0;
}

/* Does the used ring stand where we left it? Otherwise the guest has begun a new one there. */
static bool np_vring_continues(np_vring *v) {
    return !v->unlocated && v->used &&
           load16(&v->used[INDEX], memory_order_relaxed) == v->counters->used_index;
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

/* ---- Taking requests ---- */

static uint8_t *header_of(np_vring *v, uint32_t slot) {
    return v->config.headers + (size_t)slot * v->config.header_stride;
}

/* The fixed part of the message. The first seven bytes say how long that is; they are kept. */
static uint32_t copy_header(np_vring *v, uint32_t at) {
    const struct slot *slot = &v->slots[at];
    uint8_t *header = header_of(v, at);
    uint64_t len = slot->stream[NP_READABLE].bytes;
    copy(&v->chains, slot, NP_READABLE, 0, header, min(len, PREFIX));
    if (len > PREFIX) {
        len = min(len, v->config.limits[header[TYPE]]);
        copy(&v->chains, slot, NP_READABLE, PREFIX, header + PREFIX, len - PREFIX);
    }
    return (uint32_t)len;
}

static uint32_t little(const uint8_t *from, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint32_t)from[i] << (8 * i);
    return value;
}

static void describe(np_vring *v, uint32_t at, const uint32_t fault[2], np_request *request) {
    const struct slot *slot = &v->slots[at];
    const uint8_t *header = header_of(v, at);
    uint32_t header_len = copy_header(v, at);
    bool whole = header_len >= PREFIX;
    *request = (np_request){
        .slot = at,
        .readable = (uint32_t)min(slot->stream[NP_READABLE].bytes, UINT32_MAX),
        .writable = (uint32_t)min(slot->stream[NP_WRITABLE].bytes, UINT32_MAX),
        .header_len = header_len,
        .fault = fault[NP_READABLE] ? fault[NP_READABLE]
                 : whole            ? fault[NP_WRITABLE]
                                    : EBADMSG,
        .size = whole ? little(header, 4) : 0,
        .type = whole ? header[TYPE] : 0,
        .tag = whole ? little(header + TAG, 2) : 0,
    };
}

static int take(np_vring *v, uint32_t head, np_request *request) {
    if (head >= v->config.num)
        return broken(&v->chains, "head %u is available on a ring of %u", head, v->config.num);
    if (v->taken[head])
        return broken(&v->chains, "head %u is available again while in flight", head);
    /* Heads in flight are distinct, so there are slots enough. */
    uint32_t fault[2] = {0, 0}, at = v->rested ? v->resting[v->rested - 1] : v->fresh;
    struct slot *slot = &v->slots[at];
    if (at == v->fresh)
        v->resting[v->rested++] = (uint16_t)v->fresh++;
    if (read_chain(&v->chains, slot, head, fault) < 0)
        return -1;
    v->rested--;
    v->taken[head] = true;
    slot->head = (uint16_t)head;
    slot->in_flight = true;
    slot->gone = false;
    v->counters->in_flight++;
    describe(v, at, fault, request);
    return 0;
}

static uint16_t available(np_vring *v) {
    uint16_t index = load16(&v->avail[INDEX], memory_order_acquire);
    return (uint16_t)(index - v->counters->last_avail);
}

/* Requests before a malformed one are delivered; the next call then reports the broken ring. */
static int take_batch(np_vring *v) {
    uint32_t n = available(v), taken = 0;
    if (lost(v))
        return -1;
    if (n > v->config.num)
        return broken(&v->chains, "avail.idx is %u entries ahead on a ring of %u", n,
                      v->config.num);
    n = (uint32_t)min(n, v->config.batch);
    for (; taken < n; taken++, v->counters->last_avail++) {
        uint32_t at = v->counters->last_avail & (v->config.num - 1);
        uint16_t head = load16(&v->avail[RING + at], memory_order_relaxed);
        if (take(v, head, &v->config.requests[taken]) < 0)
            break;
    }
    if (lost(v))
        return -1; /* what was just copied may be zeros */
    v->counters->requests += taken;
    v->counters->batches += taken > 0;
    return taken < n && taken == 0 ? -1 : (int)taken;
}

/* ---- Returning requests ---- */

static struct slot *slot_in_flight(np_vring *v, uint32_t at) {
    return at < v->config.num && v->slots[at].in_flight ? &v->slots[at] : NULL;
}

static void notify(np_vring *v) {
    uint16_t old = v->call_index, new = v->counters->used_index;
    bool wanted;
    /* The index store above must be visible before we read what the driver wants. */
    atomic_thread_fence(memory_order_seq_cst);
    if (v->config.event_idx) {
        uint16_t event = load16(&v->avail[RING + v->config.num], memory_order_relaxed);
        wanted = !v->called || (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    } else {
        wanted = !(load16(&v->avail[FLAGS], memory_order_relaxed) & AVAIL_NO_INTERRUPT);
    }
    v->called = true;
    v->call_index = new;
    enum signal_kind kind =
        (enum signal_kind)atomic_load_explicit(&v->call_kind, memory_order_acquire);
    if (wanted && kind != SIGNAL_NONE) {
        v->counters->calls++;
        send_signal(atomic_load_explicit(&v->call, memory_order_relaxed), kind);
    }
}

static void write_header(np_vring *v, const np_done *done, uint8_t *reply) {
    uint32_t size = htole32(done->used_len);
    memcpy(reply, &size, sizeof size);
    reply[TYPE] = (uint8_t)done->type;
    memcpy(reply + TAG, header_of(v, done->slot) + TAG, PREFIX - TAG);
}

/* The reply, if its chain is still in guest memory; otherwise the length is 0: no reply. */
static int finish(np_vring *v, np_done *done) {
    struct slot *slot = slot_in_flight(v, done->slot);
    uint64_t room = slot ? slot->stream[NP_WRITABLE].bytes : 0;
    if (!slot || done->used_len > room || done->copy_len > min(room, v->config.reply_stride) ||
        (done->type && done->copy_len < PREFIX))
        return -EINVAL;
    if (slot->gone) {
        done->used_len = 0;
        return 0;
    }
    uint8_t *reply = v->config.replies + (size_t)done->slot * v->config.reply_stride;
    if (done->type)
        write_header(v, done, reply);
    copy(&v->chains, slot, NP_WRITABLE, 0, reply, done->copy_len);
    return 0;
}

static void release(np_vring *v, struct slot *slot) {
    slot->in_flight = false;
    v->taken[slot->head] = false;
    v->resting[v->rested++] = (uint16_t)(slot - v->slots);
}

/* Publishes config.done[0..count); -EINVAL at an entry that names no request or does not fit, and
 * -EFAULT if the ring is not in guest memory. */
static int np_vring_push(np_vring *v, uint32_t count) {
    uint32_t i;
    if (v->unlocated)
        return -EFAULT;
    if (count > v->config.num)
        return -EINVAL;
    for (i = 0; i < count; i++) {
        np_done done = v->config.done[i];
        if (finish(v, &done) < 0)
            break;
        struct slot *slot = &v->slots[done.slot];
        uint32_t at = (v->counters->used_index + i) & (v->config.num - 1);
        _Atomic uint32_t *element = &v->used_ring[2 * at];
        atomic_store_explicit(&element[0], htole32(slot->head), memory_order_relaxed);
        atomic_store_explicit(&element[1], htole32(done.used_len), memory_order_relaxed);
        mark_used(v, USED_RING + USED_ELEMENT * at, USED_ELEMENT);
        release(v, slot);
    }
    if (i) {
        v->counters->in_flight -= i;
        v->counters->used_index += (uint16_t)i;
        store16(&v->used[INDEX], v->counters->used_index, memory_order_release);
        mark_used(v, sizeof(uint16_t) * INDEX, sizeof(uint16_t));
        announce_marks(v->chains.log);
        notify(v);
    }
    return i < count ? -EINVAL : 0;
}

/* ---- Bulk data, for whoever owns the slot ---- */

/* Between data and a stream, all or nothing: a reply is never cut short. */
static int np_vring_copy(np_vring *v, int stream, uint32_t at, uint64_t skip, uint8_t *data,
                         uint64_t len) {
    const struct slot *slot = slot_in_flight(v, at);
    if (!slot)
        return -EINVAL;
    if (slot->gone)
        return -EFAULT;
    if (len > tail_of(slot, stream, skip).bytes)
        return -EMSGSIZE;
    copy(&v->chains, slot, stream, skip, data, len);
    return atomic_load(&v->chains.memory->lost) ? -EFAULT : 0;
}

/* Between a file and a stream. */
static int64_t np_vring_move(np_vring *v, int stream, uint32_t at, uint64_t skip, int fd,
                             uint64_t count, int64_t offset, int flags) {
    const struct slot *slot = slot_in_flight(v, at);
    if (!slot)
        return -EINVAL;
    if (slot->gone)
        return -EFAULT;
    return move(&v->chains, slot, stream, skip, fd, count, offset, flags);
}
