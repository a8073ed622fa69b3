/*
 * Requests: taken from the available ring, returned on the used ring, and their data between. Comes
 * behind _vring.c.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* cdef-begin */
static int np_vring_push(np_vring *v, uint32_t count);
static int np_vring_copy(np_vring *v, int stream, uint32_t slot, uint64_t skip, uint8_t *data,
                         uint64_t len);
static int64_t np_vring_move(np_vring *v, int stream, uint32_t slot, uint64_t skip, int fd,
                             uint64_t count, int64_t offset, int flags);
static int64_t np_vring_write(np_vring *v, uint32_t slot, uint64_t skip, int fd, uint64_t count,
                              int64_t offset, int keep_set_ids);
/* cdef-end */

enum { PREFIX = 7, TYPE = 4, TAG = 5 }; /* of a 9P message: size[4] type[1] tag[2] */

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

static int take(np_vring *v, uint32_t head, uint64_t now, np_request *request) {
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
    slot->type = (uint8_t)request->type;
    slot->since = now;
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
    uint64_t now = n ? now_ns() : 0;
    for (; taken < n; taken++, v->counters->last_avail++) {
        uint32_t at = v->counters->last_avail & (v->config.num - 1);
        uint16_t head = load16(&v->avail[RING + at], memory_order_relaxed);
        if (take(v, head, now, &v->config.requests[taken]) < 0)
            break;
    }
    if (lost(v))
        return -1; /* what was just copied may be zeros */
    if (taken) {
        bump(&v->stats->taken, taken);
        bump(&v->stats->batches, 1);
        gauge(&v->stats->in_flight, v->counters->in_flight);
    }
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
        bump(&v->stats->calls, 1);
        send_signal(atomic_load_explicit(&v->call, memory_order_relaxed), kind);
    } else if (!wanted) {
        bump(&v->stats->calls_saved, 1);
    }
}

/* An np_done. */
struct reply {
    uint32_t slot, type, copy_len, used_len;
};

static struct reply unpack(uint64_t done) {
    struct reply reply;
    reply.used_len = done & ((1U << NP_USED_BITS) - 1);
    done >>= NP_USED_BITS;
    reply.copy_len = done & ((1U << NP_COPY_BITS) - 1);
    done >>= NP_COPY_BITS;
    reply.type = done & ((1U << NP_TYPE_BITS) - 1);
    reply.slot = (uint32_t)(done >> NP_TYPE_BITS);
    return reply;
}

static void write_header(np_vring *v, const struct reply *done, uint8_t *reply) {
    uint32_t size = htole32(done->used_len);
    memcpy(reply, &size, sizeof size);
    reply[TYPE] = (uint8_t)done->type;
    memcpy(reply + TAG, header_of(v, done->slot) + TAG, PREFIX - TAG);
}

/* The reply, if its chain is still in guest memory; otherwise the length is 0: no reply. */
static int finish(np_vring *v, struct reply *done, uint64_t now) {
    struct slot *slot = slot_in_flight(v, done->slot);
    uint64_t room = slot ? slot->stream[NP_WRITABLE].bytes : 0;
    if (!slot || done->used_len > room || done->copy_len > min(room, v->config.reply_stride) ||
        (done->type && done->copy_len < PREFIX))
        return -EINVAL;
    if (slot->gone || !done->type)
        bump(&v->stats->dropped, 1);
    if (slot->gone) {
        done->used_len = 0;
        return 0;
    }
    uint8_t *reply = v->config.replies + (size_t)done->slot * v->config.reply_stride;
    if (done->type) {
        write_header(v, done, reply);
        uint64_t in = min(slot->stream[NP_READABLE].bytes, little(header_of(v, done->slot), 4));
        count_reply(v->stats, slot->type, now - slot->since, in, done->used_len, reply,
                    done->copy_len);
    }
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
    if (!v->used)
        return -EFAULT;
    if (count > v->config.num)
        return -EINVAL;
    uint64_t now = count ? now_ns() : 0;
    for (i = 0; i < count; i++) {
        struct reply done = unpack((uint64_t)v->config.done[i]);
        if (finish(v, &done, now) < 0)
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
        gauge(&v->stats->in_flight, v->counters->in_flight);
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

/* The same from the readable stream, on behalf of somebody who may leave set-ID bits or not. */
static int64_t np_vring_write(np_vring *v, uint32_t at, uint64_t skip, int fd, uint64_t count,
                              int64_t offset, int keep_set_ids) {
    int error = nd_keep_set_ids(keep_set_ids);
    return error ? error : np_vring_move(v, NP_READABLE, at, skip, fd, count, offset, 0);
}
