/*
 * Descriptor chains: copied out of guest memory once, then used from the copy alone. Comes behind
 * _memory.c and _dirty.c.
 *
 * A chain is kept in a slot as two byte streams, one over all its readable descriptors and one
 * over the writable ones. A segment of a stream knows its guest physical address, too: that is what
 * the dirty log speaks of, and how it is found again when guest memory has been mapped anew. Slots
 * are numbered by how many are in use, not by the ring's heads: a large ring that holds few
 * requests touches little memory.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* cdef-begin */
/* The two byte streams of a chain. */
enum { NP_READABLE, NP_WRITABLE };
/* cdef-end */

#define DESC_SIZE 16
#define SEGMENTS_MIN 1024 /* Linux sends 128-entry tables on a 64-entry ring */

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct segment {
    uint8_t *host;
    uint64_t gpa, len;
};

struct stream {
    uint32_t count; /* of segments */
    uint64_t bytes;
};

struct slot {
    struct segment *segments; /* the readable stream's, then the writable one's */
    uint32_t capacity;
    uint16_t head;
    bool in_flight;
    bool gone;      /* its memory is not mapped at present */
    uint8_t type;   /* of the message; 0: it has no whole header */
    uint64_t since; /* when it was taken from the ring */
    struct stream stream[2];
};

/* What chains are read with. */
struct chains {
    np_memory *memory;
    np_log *log;            /* NULL: nothing is logged */
    _Atomic uint64_t *desc; /* the descriptor table, two words each */
    uint32_t num, segments_max, hint;
    bool indirect;
    char broken[200];
    uint64_t table[2 * SEGMENTS_MIN]; /* the indirect table being walked */
};

__attribute__((format(printf, 2, 3))) static int broken(struct chains *c, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(c->broken, sizeof(c->broken), format, args);
    va_end(args);
    return -1;
}

/* Guest bytes copied out: what was read is now read for good, the compiler may not look again. */
static void copy_in(void *to, const void *guest, size_t len) {
    memcpy(to, guest, len);
    atomic_signal_fence(memory_order_seq_cst);
}

/* ---- Streams ---- */

struct tail {
    const struct segment *segment; /* what is left of the stream */
    uint64_t offset;               /* into the first segment */
    uint64_t bytes;
};

static struct tail tail_of(const struct slot *slot, int stream, uint64_t skip) {
    const struct stream *s = &slot->stream[stream];
    struct tail tail = {.segment = slot->segments};
    if (skip >= s->bytes)
        return tail;
    if (stream == NP_WRITABLE)
        tail.segment += slot->stream[NP_READABLE].count;
    tail.bytes = s->bytes - skip;
    while (skip >= tail.segment->len)
        skip -= tail.segment++->len;
    tail.offset = skip;
    return tail;
}

/* The next contiguous piece, of no more than want bytes; want and the tail must not be empty. */
static struct segment next_piece(struct tail *tail, uint64_t want) {
    uint64_t room = tail->segment->len - tail->offset;
    struct segment piece = {.host = tail->segment->host + tail->offset,
                            .gpa = tail->segment->gpa + tail->offset,
                            .len = min(want, room)};
    tail->bytes -= piece.len;
    tail->offset += piece.len;
    if (piece.len == room) {
        tail->segment++;
        tail->offset = 0;
    }
    return piece;
}

/* From data into the writable stream, or out of the readable one; the stream is long enough. */
static void copy(const struct chains *c, const struct slot *slot, int stream, uint64_t skip,
                 uint8_t *data, uint64_t len) {
    struct tail tail = tail_of(slot, stream, skip);
    while (len) {
        struct segment piece = next_piece(&tail, len);
        if (stream == NP_WRITABLE) {
            memcpy(piece.host, data, piece.len);
            mark_dirty(c->log, piece.gpa, piece.len);
        } else {
            copy_in(data, piece.host, piece.len);
        }
        data += piece.len;
        len -= piece.len;
    }
}

/* The kernel wrote the next len bytes of a stream. */
static void mark_written(const struct chains *c, struct tail tail, uint64_t len) {
    while (c->log && len) {
        struct segment piece = next_piece(&tail, len);
        mark_dirty(c->log, piece.gpa, piece.len);
        len -= piece.len;
    }
}

/* Moves up to count bytes between a file and a stream, as preadv2 and pwritev2 do; an error is
 * reported only if nothing was moved before it. */
static int64_t move(const struct chains *c, const struct slot *slot, int stream, uint64_t skip,
                    int fd, uint64_t count, int64_t offset, int flags) {
    struct iovec window[IOV_MAX];
    struct tail tail = tail_of(slot, stream, skip);
    int64_t total = 0;
    count = min(count, tail.bytes);
    while (count) {
        const struct tail start = tail;
        uint64_t wanted = 0;
        int pieces = 0;
        while (wanted < count && pieces < IOV_MAX) {
            struct segment piece = next_piece(&tail, count - wanted);
            window[pieces++] = (struct iovec){.iov_base = piece.host, .iov_len = piece.len};
            wanted += piece.len;
        }
        int64_t at = offset < 0 ? -1 : offset + total;
        ssize_t n = stream == NP_WRITABLE ? preadv2(fd, window, pieces, at, flags)
                                          : pwritev2(fd, window, pieces, at, flags);
        int error = errno;
        if (stream ==
            NP_WRITABLE) /* before an error, direct I/O may have come as far as it likes */
            mark_written(c, start, n < 0 ? wanted : (uint64_t)n);
        if (n < 0)
            return total ? total : -error;
        total += n;
        count = (uint64_t)n < wanted ? 0 : count - wanted; /* a short transfer is the last one */
    }
    return total;
}

/* ---- Reading a chain ---- */

static struct descriptor fetch(const struct chains *c, bool in_table, uint32_t at) {
    uint64_t addr =
        in_table ? c->table[2 * at] : atomic_load_explicit(&c->desc[2 * at], memory_order_relaxed);
    uint64_t rest = in_table ? c->table[2 * at + 1]
                             : atomic_load_explicit(&c->desc[2 * at + 1], memory_order_relaxed);
    rest = le64toh(rest);
    return (struct descriptor){le64toh(addr), (uint32_t)rest, (uint16_t)(rest >> 32),
                               (uint16_t)(rest >> 48)};
}

/* Copies an indirect table, which may cross regions, and returns its number of entries or -1. */
static int load_table(struct chains *c, struct descriptor d) {
    if (!c->indirect)
        return broken(c, "an indirect descriptor, but the feature was not negotiated");
    if (d.flags & DESC_NEXT)
        return broken(c, "a descriptor with both INDIRECT and NEXT");
    if (d.len == 0 || d.len % DESC_SIZE || d.len > sizeof(c->table))
        return broken(c, "an indirect table of %u bytes", d.len);
    for (uint64_t done = 0, n; done < d.len; done += n) {
        n = d.len - done;
        uint8_t *host = resolve(c->memory, d.addr + done, &n, &c->hint);
        if (!host)
            return broken(c, "an indirect table outside guest memory, at 0x%llx",
                          (unsigned long long)d.addr);
        copy_in((uint8_t *)c->table + done, host, n);
    }
    return (int)(d.len / DESC_SIZE);
}

static bool grow(struct slot *slot, uint32_t limit) {
    uint32_t capacity = (uint32_t)min(slot->capacity ? 2 * slot->capacity : 8, limit);
    struct segment *segments = realloc(slot->segments, capacity * sizeof(*segments));
    if (!segments)
        return false;
    slot->segments = segments;
    slot->capacity = capacity;
    return true;
}

/* Adds a guest buffer to a stream, in as few segments as our mappings allow; 0 or a fault. */
static uint32_t append(struct chains *c, struct slot *slot, int direction, uint64_t addr,
                       uint64_t len) {
    struct stream *s = &slot->stream[direction];
    for (uint64_t n; len; addr += n, len -= n) { /* regions end below 2^64: addr cannot wrap */
        uint32_t used = slot->stream[NP_READABLE].count + slot->stream[NP_WRITABLE].count;
        struct segment *last = s->count ? &slot->segments[used - 1] : NULL;
        n = len;
        uint8_t *host = resolve(c->memory, addr, &n, &c->hint);
        if (!host)
            return EFAULT;
        if (last && last->host + last->len == host && last->gpa + last->len == addr) {
            last->len += n;
        } else {
            if (used == c->segments_max)
                return E2BIG;
            if (used == slot->capacity && !grow(slot, c->segments_max))
                return ENOMEM;
            slot->segments[used] = (struct segment){.host = host, .gpa = addr, .len = n};
            s->count++;
        }
        s->bytes += n;
    }
    return 0;
}

/* Fills the slot with the chain at `head`, and tells the fault of each stream; -1: malformed. */
static int read_chain(struct chains *c, struct slot *slot, uint32_t head, uint32_t fault[2]) {
    uint32_t size = c->num, left = size, at = head;
    bool in_table = false;
    int direction = NP_READABLE;
    memset(slot->stream, 0, sizeof(slot->stream));
    for (;;) {
        struct descriptor d = fetch(c, in_table, at);
        if (d.flags & DESC_INDIRECT) {
            int entries = in_table ? broken(c, "an INDIRECT descriptor inside an indirect table")
                                   : load_table(c, d);
            if (entries < 0)
                return -1;
            in_table = true;
            size = left = (uint32_t)entries;
            at = 0;
            continue;
        }
        if (d.flags & DESC_WRITE)
            direction = NP_WRITABLE;
        else if (direction == NP_WRITABLE)
            return broken(c, "a readable descriptor after a writable one, head %u", head);
        if (!fault[direction]) /* a stream ends at its first hole */
            fault[direction] = append(c, slot, direction, d.addr, d.len);
        if (!(d.flags & DESC_NEXT))
            return 0;
        if (--left == 0)
            return broken(c, "a descriptor chain that loops, head %u", head);
        if (d.next >= size)
            return broken(c, "descriptor %u is chained in a table of %u", d.next, size);
        at = d.next;
    }
}

/* Guest memory was mapped anew. What a chain whose memory is not there now consists of is kept: the
 * region may come back (QEMU removes and adds regions under a running ring). */
static void relocate_slot(struct chains *c, struct slot *slot) {
    struct slot found = {.head = slot->head, .in_flight = true};
    const struct segment *segment = slot->segments;
    uint32_t fault = 0;
    for (int direction = NP_READABLE; direction <= NP_WRITABLE; direction++)
        for (uint32_t i = 0; !fault && i < slot->stream[direction].count; i++, segment++)
            fault = append(c, &found, direction, segment->gpa, segment->len);
    slot->gone = fault != 0;
    free(fault ? found.segments : slot->segments);
    if (!fault)
        *slot = found;
}
