/*
 * The split virtqueue of one virtio device, seen from the device. Comes behind _memory.c.
 *
 * Theory of operation. The guest owns all shared memory and may rewrite it at any time. So each
 * descriptor, indirect table and request header is copied once into private memory, and lengths,
 * flags and addresses are checked and used on that copy only. Our own positions live here and are
 * never read back from the guest. Bulk data is not copied by us at all: preadv2 and pwritev2 move
 * it between a file and guest pages, and the kernel turns a bad page into EFAULT.
 *
 * One thread, the device thread, takes requests and publishes used elements. A slot (named by the
 * head descriptor of its chain) belongs to whoever works on that request, from the batch that
 * np_vring_wait() delivers until np_vring_push() returns it; the bulk functions touch the slot
 * alone, so workers may call them meanwhile. Everything else happens while the ring is stopped.
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
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* cdef-begin */
typedef struct np_vring np_vring;

/* The two byte streams of a chain, each over all its descriptors of that direction. */
enum { NP_READABLE, NP_WRITABLE };

/* One request of a batch. fault: 0, or an errno: EFAULT (a buffer outside guest memory), E2BIG (too
 * many segments), EBADMSG (no whole 9P header), ENOMEM. Totals count the bytes before any hole.
 * size, type and tag are what the copied header says, unchecked; 0 if it is not whole. */
typedef struct {
    uint32_t head, readable, writable, header_len, fault, size, type, tag;
} np_request;

/* One reply: `copy_len` bytes of the slot's reply buffer, of `used_len` in all. If `type` is not 0,
 * the first 7 bytes are its 9P header, which is written here: the tag is the request's. */
typedef struct {
    uint32_t head, type, copy_len, used_len;
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
    uint16_t limits[256]; /* of the header copy, by message type: 7 to header_stride */
} np_vring_config;

static np_vring *np_vring_new(np_memory *m, const np_vring_config *config);
static void np_vring_free(np_vring *v);
static const char *np_vring_broken(np_vring *v);
static void np_vring_set_call(np_vring *v, int fd);
static int np_vring_wait(np_vring *v, uint32_t spin_us_max);
static void np_vring_wake(np_vring *v);
static int np_vring_push(np_vring *v, uint32_t count);
static int np_vring_copy(np_vring *v, int stream, uint32_t head, uint64_t skip, uint8_t *data,
                         uint64_t len);
static int64_t np_vring_move(np_vring *v, int stream, uint32_t head, uint64_t skip, int fd,
                             uint64_t count, int64_t offset, int flags);
static void np_signal(int fd);
/* cdef-end */

/* ---- Signals to the front end ---- */

/*
 * Call and error descriptors are eventfds, except in User-Mode Linux, where they are stream
 * sockets. The open file is shared with the front end, so its flags are not ours to change: one
 * that may block is asked first, for a front end must not stall us by not reading.
 */
enum signal_kind { SIGNAL_NONE, SIGNAL_EVENT, SIGNAL_BLOCKING, SIGNAL_SOCKET };

static enum signal_kind signal_kind(int fd) {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        return SIGNAL_NONE;
    if (S_ISSOCK(status.st_mode))
        return SIGNAL_SOCKET;
    return fcntl(fd, F_GETFL) & O_NONBLOCK ? SIGNAL_EVENT : SIGNAL_BLOCKING;
}

/* A failure to write means that the peer has a signal pending (EAGAIN) or is gone: no harm. */
static void send_signal(int fd, enum signal_kind kind) {
    const uint64_t one = 1;
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    ssize_t sent = 0;
    if (kind == SIGNAL_SOCKET)
        sent = send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
    else if (kind == SIGNAL_EVENT || (kind == SIGNAL_BLOCKING && poll(&ready, 1, 0) == 1))
        sent = write(fd, &one, sizeof(one));
    (void)sent;
}

static void np_signal(int fd) { send_signal(fd, signal_kind(fd)); }

/* ---- The ring ---- */

#define DESC_SIZE 16
#define RING_MAX 32768
#define IDLE_KICKS_MAX 64
#define YIELDED_NS 2000 /* a sched_yield() that took so long has let somebody else run */
#define CROWDED_MAX 4
#define SEGMENTS_MIN 1024 /* Linux sends 128-entry tables on a 64-entry ring */

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { PREFIX = 7, TYPE = 4, TAG = 5 }; /* of a 9P message: size[4] type[1] tag[2] */
enum { FLAGS, INDEX, RING };            /* u16 places in the avail and used areas */

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct stream {
    uint32_t count; /* of segments */
    uint64_t bytes;
};

struct slot {
    struct iovec *iov; /* the readable stream's segments, then the writable one's */
    uint32_t capacity;
    struct stream stream[2];
    bool in_flight;
};

struct np_vring {
    np_vring_config config;
    np_counters *counters;
    np_memory *memory;
    uint32_t hint, segments_max;
    _Atomic uint64_t *desc; /* two words each */
    _Atomic uint16_t *avail, *used;
    _Atomic uint32_t *used_ring; /* id, len */
    enum signal_kind call_kind;
    bool called;         /* a notify decision has been made... */
    uint16_t call_index; /* ...and this was the used index then */
    uint64_t window_ns;  /* how long to spin before sleeping */
    uint32_t shut;       /* times that we slept without spinning first */
    uint32_t crowded;    /* times in a row that others ran while we spun */
    uint32_t idle_kicks;
    atomic_bool woken, asleep;
    char broken[200];
    uint64_t table[2 * SEGMENTS_MIN]; /* the indirect table being walked */
    struct slot slots[];
};

__attribute__((format(printf, 2, 3))) static int broken(np_vring *v, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(v->broken, sizeof(v->broken), format, args);
    va_end(args);
    return -1;
}

static bool lost(np_vring *v) {
    return atomic_load(&v->memory->lost) &&
           broken(v, "guest memory vanished: the front end truncated the file behind it");
}

static uint16_t load16(_Atomic uint16_t *p, memory_order order) {
    return le16toh(atomic_load_explicit(p, order));
}

static void store16(_Atomic uint16_t *p, uint16_t value, memory_order order) {
    atomic_store_explicit(p, htole16(value), order);
}

/* Guest bytes copied out: what was read is now read for good, the compiler may not look again. */
static void copy_in(void *to, const void *guest, size_t len) {
    memcpy(to, guest, len);
    atomic_signal_fence(memory_order_seq_cst);
}

static uint8_t *locate(np_vring *v, const char *what, unsigned long long ua, uint64_t len,
                       uint32_t align) {
    uint8_t *host = find_ua(v->memory, ua, len);
    if (!host)
        broken(v, "the %s at 0x%llx is not inside one of the %u memory regions", what, ua,
               v->memory->count);
    else if (((uintptr_t)host | ua) % align)
        broken(v, "the %s at 0x%llx is not aligned to %u bytes", what, ua, align);
    else
        return host;
    return NULL;
}

static void locate_ring(np_vring *v) {
    const np_vring_config *c = &v->config;
    uint64_t event = c->event_idx ? 2 : 0, desc_len = 16ull * c->num,
             avail_len = 4 + 2ull * c->num + event, used_len = 4 + 8ull * c->num + event;
    uint8_t *desc, *avail, *used;
    if (!(desc = locate(v, "descriptor table", c->desc, desc_len, 16)) ||
        !(avail = locate(v, "available ring", c->avail, avail_len, 2)) ||
        !(used = locate(v, "used ring", c->used, used_len, 4)))
        return;
    if (overlap(c->desc, desc_len, c->avail, avail_len) ||
        overlap(c->desc, desc_len, c->used, used_len) ||
        overlap(c->avail, avail_len, c->used, used_len))
        broken(v, "the descriptor table, available ring and used ring overlap");
    v->desc = (_Atomic uint64_t *)desc;
    v->avail = (_Atomic uint16_t *)avail;
    v->used = (_Atomic uint16_t *)used;
    v->used_ring = (_Atomic uint32_t *)(used + 4);
    /* The guest's copy counts only here: a resumed ring goes on where it was left. */
    v->counters->used_index = load16(&v->used[INDEX], memory_order_relaxed);
}

/* NULL only for want of memory; a ring that cannot work comes back broken. */
static np_vring *np_vring_new(np_memory *m, const np_vring_config *config) {
    uint32_t num = config->num;
    bool valid = num && num <= RING_MAX && !(num & (num - 1));
    np_vring *v = calloc(1, sizeof(*v) + (valid ? num : 0) * sizeof(v->slots[0]));
    if (!v)
        return NULL;
    v->memory = m;
    v->config = *config;
    v->counters = config->counters;
    v->counters->last_avail = config->base;
    v->segments_max = num > SEGMENTS_MIN ? num : SEGMENTS_MIN;
    np_vring_set_call(v, config->call);
    if (valid)
        locate_ring(v);
    else
        broken(v, "a ring of %u entries: not a power of two up to %d", num, RING_MAX);
    return v;
}

static void np_vring_free(np_vring *v) {
    for (uint32_t i = 0; v->desc && i < v->config.num; i++)
        free(v->slots[i].iov);
    free(v);
}

static const char *np_vring_broken(np_vring *v) { return v->broken; }

static void np_vring_set_call(np_vring *v, int fd) {
    v->config.call = fd;
    v->call_kind = signal_kind(fd);
}

/* ---- Streams: the readable or writable bytes of a chain ---- */

struct tail {
    const struct iovec *iov; /* what is left of the stream */
    size_t offset;           /* into the first segment */
    uint64_t bytes;
};

static struct tail tail_of(const struct slot *slot, int stream, uint64_t skip) {
    const struct stream *s = &slot->stream[stream];
    struct tail tail = {.iov = slot->iov};
    if (stream == NP_WRITABLE)
        tail.iov += slot->stream[NP_READABLE].count;
    if (skip >= s->bytes)
        return tail;
    tail.bytes = s->bytes - skip;
    while (skip >= tail.iov->iov_len)
        skip -= tail.iov++->iov_len;
    tail.offset = skip;
    return tail;
}

/* The next contiguous piece, of no more than want bytes; want and the tail must not be empty. */
static struct iovec next_piece(struct tail *tail, size_t want) {
    size_t room = tail->iov->iov_len - tail->offset;
    struct iovec piece = {.iov_base = (uint8_t *)tail->iov->iov_base + tail->offset,
                          .iov_len = min(want, room)};
    tail->bytes -= piece.iov_len;
    tail->offset += piece.iov_len;
    if (piece.iov_len == room) {
        tail->iov++;
        tail->offset = 0;
    }
    return piece;
}

/* From data into the writable stream, or out of the readable one; the stream is long enough. */
static void copy(const struct slot *slot, int stream, uint64_t skip, uint8_t *data, size_t len) {
    struct tail tail = tail_of(slot, stream, skip);
    while (len) {
        struct iovec piece = next_piece(&tail, len);
        if (stream == NP_WRITABLE)
            memcpy(piece.iov_base, data, piece.iov_len);
        else
            copy_in(data, piece.iov_base, piece.iov_len);
        data += piece.iov_len;
        len -= piece.iov_len;
    }
}

/* ---- Taking requests ---- */

static struct descriptor fetch(np_vring *v, bool in_table, uint32_t at) {
    uint64_t addr =
        in_table ? v->table[2 * at] : atomic_load_explicit(&v->desc[2 * at], memory_order_relaxed);
    uint64_t rest = in_table ? v->table[2 * at + 1]
                             : atomic_load_explicit(&v->desc[2 * at + 1], memory_order_relaxed);
    rest = le64toh(rest);
    return (struct descriptor){le64toh(addr), (uint32_t)rest, (uint16_t)(rest >> 32),
                               (uint16_t)(rest >> 48)};
}

/* Copies an indirect table, which may cross regions, and returns its number of entries or -1. */
static int load_table(np_vring *v, struct descriptor d) {
    if (!v->config.indirect)
        return broken(v, "an indirect descriptor, but the feature was not negotiated");
    if (d.flags & DESC_NEXT)
        return broken(v, "a descriptor with both INDIRECT and NEXT");
    if (d.len == 0 || d.len % DESC_SIZE || d.len > sizeof(v->table))
        return broken(v, "an indirect table of %u bytes", d.len);
    for (uint64_t done = 0, n; done < d.len; done += n) {
        n = d.len - done;
        uint8_t *host = resolve(v->memory, d.addr + done, &n, &v->hint);
        if (!host)
            return broken(v, "an indirect table outside guest memory, at 0x%llx",
                          (unsigned long long)d.addr);
        copy_in((uint8_t *)v->table + done, host, n);
    }
    return (int)(d.len / DESC_SIZE);
}

static bool grow(struct slot *slot, uint32_t limit) {
    uint32_t capacity = (uint32_t)min(slot->capacity ? 2 * slot->capacity : 8, limit);
    struct iovec *iov = realloc(slot->iov, capacity * sizeof(*iov));
    if (!iov)
        return false;
    slot->iov = iov;
    slot->capacity = capacity;
    return true;
}

/* Adds a guest buffer to a stream, in as few segments as our mappings allow; 0 or a fault. */
static uint32_t append(np_vring *v, struct slot *slot, int direction, uint64_t addr, uint64_t len) {
    struct stream *s = &slot->stream[direction];
    for (uint64_t n; len; addr += n, len -= n) { /* regions end below 2^64: addr cannot wrap */
        uint32_t used = slot->stream[NP_READABLE].count + slot->stream[NP_WRITABLE].count;
        struct iovec *last = s->count ? &slot->iov[used - 1] : NULL;
        n = len;
        uint8_t *host = resolve(v->memory, addr, &n, &v->hint);
        if (!host)
            return EFAULT;
        if (last && (uint8_t *)last->iov_base + last->iov_len == host) {
            last->iov_len += n;
        } else {
            if (used == v->segments_max)
                return E2BIG;
            if (used == slot->capacity && !grow(slot, v->segments_max))
                return ENOMEM;
            slot->iov[used] = (struct iovec){.iov_base = host, .iov_len = n};
            s->count++;
        }
        s->bytes += n;
    }
    return 0;
}

/* The fixed part of the message. The first seven bytes say how long that is; they are kept. */
static uint32_t copy_header(np_vring *v, uint32_t head) {
    const struct slot *slot = &v->slots[head];
    uint8_t *header = v->config.headers + (size_t)head * v->config.header_stride;
    uint64_t len = slot->stream[NP_READABLE].bytes;
    copy(slot, NP_READABLE, 0, header, min(len, PREFIX));
    if (len > PREFIX) {
        len = min(len, v->config.limits[header[TYPE]]);
        copy(slot, NP_READABLE, PREFIX, header + PREFIX, len - PREFIX);
    }
    return (uint32_t)len;
}

static uint32_t little(const uint8_t *from, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint32_t)from[i] << (8 * i);
    return value;
}

static int take(np_vring *v, uint32_t head, np_request *request) {
    if (head >= v->config.num)
        return broken(v, "head %u is available on a ring of %u", head, v->config.num);
    struct slot *slot = &v->slots[head];
    if (slot->in_flight)
        return broken(v, "head %u is available again while in flight", head);
    memset(slot->stream, 0, sizeof(slot->stream));
    uint32_t fault[2] = {0, 0}, size = v->config.num, left = size, at = head;
    bool in_table = false;
    int direction = NP_READABLE;
    for (;;) {
        struct descriptor d = fetch(v, in_table, at);
        if (d.flags & DESC_INDIRECT) {
            int entries = in_table ? broken(v, "an INDIRECT descriptor inside an indirect table")
                                   : load_table(v, d);
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
            return broken(v, "a readable descriptor after a writable one, head %u", head);
        if (!fault[direction]) /* a stream ends at its first hole */
            fault[direction] = append(v, slot, direction, d.addr, d.len);
        if (!(d.flags & DESC_NEXT))
            break;
        if (--left == 0)
            return broken(v, "a descriptor chain that loops, head %u", head);
        if (d.next >= size)
            return broken(v, "descriptor %u is chained in a table of %u", d.next, size);
        at = d.next;
    }
    slot->in_flight = true;
    v->counters->in_flight++;
    uint32_t header_len = copy_header(v, head);
    if (!fault[NP_READABLE] && header_len < PREFIX)
        fault[NP_READABLE] = EBADMSG;
    const uint8_t *header = v->config.headers + (size_t)head * v->config.header_stride;
    bool whole = header_len >= PREFIX;
    *request = (np_request){
        .head = head,
        .readable = (uint32_t)min(slot->stream[NP_READABLE].bytes, UINT32_MAX),
        .writable = (uint32_t)min(slot->stream[NP_WRITABLE].bytes, UINT32_MAX),
        .header_len = header_len,
        .fault = fault[NP_READABLE] ? fault[NP_READABLE] : fault[NP_WRITABLE],
        .size = whole ? little(header, 4) : 0,
        .type = whole ? header[TYPE] : 0,
        .tag = whole ? little(header + TAG, 2) : 0,
    };
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
        return broken(v, "avail.idx is %u entries ahead on a ring of %u", n, v->config.num);
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

/* ---- Waiting ---- */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

static bool something(np_vring *v) {
    return available(v) || atomic_load_explicit(&v->woken, memory_order_relaxed) ||
           atomic_load_explicit(&v->memory->lost, memory_order_relaxed);
}

/* While we work, kicks are unwanted: with EVENT_IDX a stale avail_event sees to that. */
static void allow_kicks(np_vring *v, bool allow) {
    if (!v->config.event_idx)
        store16(&v->used[FLAGS], allow ? 0 : USED_NO_NOTIFY, memory_order_relaxed);
    else if (allow)
        store16(&v->used[RING + 4 * v->config.num], v->counters->last_avail, memory_order_relaxed);
}

/* Takes what poll() found readable. A kick may be a blocking eventfd that others read as well:
 * RWF_NOWAIT keeps us from hanging in it. The end of a file would be readable for ever. */
static int drain(np_vring *v, const char *what, int fd) {
    uint64_t value;
    struct iovec iov = {.iov_base = &value, .iov_len = sizeof(value)};
    ssize_t n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);
    if (n < 0 && errno == EOPNOTSUPP)
        n = read(fd, &value, sizeof(value));
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
        return 0;
    return broken(v, "the %s descriptor fails: %s", what, n ? strerror(errno) : "end of file");
}

/* One sleep until the kick or the wake descriptor fires; 0, or -1 with the ring broken. */
static int doze(np_vring *v) {
    struct pollfd fds[2] = {{.fd = v->config.wake, .events = POLLIN},
                            {.fd = v->config.kick, .events = POLLIN}};
    /* Without a kick descriptor, or after many kicks for nothing: look every millisecond. */
    bool scan = v->config.kick < 0 || v->idle_kicks > IDLE_KICKS_MAX;
    v->counters->sleeps++;
    if (poll(fds, scan ? 1 : 2, scan ? 1 : -1) < 0)
        return errno == EINTR ? 0 : broken(v, "poll: %s", strerror(errno));
    if (fds[0].revents) {
        atomic_store(&v->woken, true);
        if (drain(v, "wake", v->config.wake) < 0)
            return -1;
    }
    if (scan) {
        v->idle_kicks = IDLE_KICKS_MAX;
    } else if (fds[1].revents) {
        v->counters->kicks++;
        v->idle_kicks++;
        return drain(v, "kick", v->config.kick);
    }
    return 0;
}

/* Asked now and then, because an administrator may change it. */
static bool confined(void) {
    cpu_set_t cpus;
    return sched_getaffinity(0, sizeof(cpus), &cpus) == 0 && CPU_COUNT(&cpus) == 1;
}

/*
 * Returns when there is something to look at. How long to spin first is learnt as KVM learns its
 * halt_poll_ns (virt/kvm/kvm_main.c, kvm_vcpu_halt): a gap that spinning would have caught opens
 * the window to twice that gap, one far longer halves it, so an idle ring soon does not spin. What
 * we measure holds our own wake-up, though: a slow one must not shut the window for ever, so every
 * 16th time it is tried again.
 *
 * Spinning is for a CPU of our own. On the only CPU that we may use, if others run whenever we
 * yield, it just makes the guest change processes more often: so we sleep and leave the window
 * shut.
 */
static int idle(np_vring *v, uint64_t max_ns) {
    uint64_t start = now_ns();
    uint64_t window_ns = min(v->window_ns, max_ns);
    if (!window_ns && ++v->shut % 16 == 0)
        window_ns = max_ns;
    bool yielded = false;
    for (uint64_t now = start; now - start < window_ns;) {
        for (int i = 0; i < 16; i++, relax())
            if (something(v)) {
                v->window_ns = window_ns;
                v->crowded = yielded ? v->crowded + 1 : 0;
                v->counters->spin_hits++;
                return 0;
            }
        uint64_t before = now_ns();
        sched_yield(); /* who waits for this CPU may be the guest itself */
        now = now_ns();
        yielded |= now - before > YIELDED_NS;
        if (yielded && v->crowded >= CROWDED_MAX) {
            if (confined())
                break;
            v->crowded = 0;
        }
    }
    if (window_ns)
        v->crowded = yielded ? v->crowded + 1 : 0;
    int result = 0;
    allow_kicks(v, true);
    atomic_store(&v->asleep, true);
    /* Either the driver sees our wish for a kick, or we see its new index. */
    atomic_thread_fence(memory_order_seq_cst);
    while (result == 0 && !something(v))
        result = doze(v);
    atomic_store(&v->asleep, false);
    allow_kicks(v, false);
    v->idle_kicks = 0;
    uint64_t gap = now_ns() - start;
    if (v->crowded > CROWDED_MAX)
        v->window_ns = 0;
    else if (gap < max_ns)
        v->window_ns = min(2 * gap, max_ns);
    else
        v->window_ns = v->window_ns > 2000 ? v->window_ns / 2 : 0;
    return result;
}

/*
 * How many requests were taken into config.requests; 0 after a mere wake; -1: the ring is broken.
 * Whichever return comes next consumes a wake, so the caller looks for its cause after each.
 */
static int np_vring_wait(np_vring *v, uint32_t spin_us_max) {
    watch_rest(v->config.watch);
    if (v->broken[0] || (!something(v) && idle(v, 1000ull * spin_us_max) < 0))
        return -1;
    watch_work(v->config.watch);
    if (atomic_load_explicit(&v->woken, memory_order_relaxed))
        atomic_exchange(&v->woken, false);
    return take_batch(v);
}

/* From any thread. A system call only if the device thread sleeps. */
static void np_vring_wake(np_vring *v) {
    atomic_store(&v->woken, true);
    if (atomic_load(&v->asleep))
        np_signal(v->config.wake);
}

/* ---- Returning requests ---- */

static struct slot *slot_in_flight(np_vring *v, uint32_t head) {
    return head < v->config.num && v->slots[head].in_flight ? &v->slots[head] : NULL;
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
    if (wanted && v->call_kind != SIGNAL_NONE) {
        v->counters->calls++;
        send_signal(v->config.call, v->call_kind);
    }
}

/* Publishes config.done[0..count); -EINVAL at an entry that names no request or does not fit. */
static int np_vring_push(np_vring *v, uint32_t count) {
    uint32_t i;
    if (count > v->config.num)
        return -EINVAL;
    for (i = 0; i < count; i++) {
        np_done done = v->config.done[i];
        struct slot *slot = slot_in_flight(v, done.head);
        uint64_t room = slot ? slot->stream[NP_WRITABLE].bytes : 0;
        if (!slot || done.used_len > room || done.copy_len > min(room, v->config.reply_stride) ||
            (done.type && done.copy_len < PREFIX))
            break;
        uint8_t *reply = v->config.replies + (size_t)done.head * v->config.reply_stride;
        if (done.type) {
            const uint8_t *request =
                v->config.headers + (size_t)done.head * v->config.header_stride;
            uint32_t size = htole32(done.used_len);
            memcpy(reply, &size, sizeof size);
            reply[TYPE] = (uint8_t)done.type;
            memcpy(reply + TAG, request + TAG, PREFIX - TAG);
        }
        copy(slot, NP_WRITABLE, 0, reply, done.copy_len);
        uint32_t at = 2 * ((v->counters->used_index + i) & (v->config.num - 1));
        atomic_store_explicit(&v->used_ring[at], htole32(done.head), memory_order_relaxed);
        atomic_store_explicit(&v->used_ring[at + 1], htole32(done.used_len), memory_order_relaxed);
        slot->in_flight = false;
    }
    if (i) {
        v->counters->in_flight -= i;
        v->counters->used_index += (uint16_t)i;
        store16(&v->used[INDEX], v->counters->used_index, memory_order_release);
        notify(v);
    }
    return i < count ? -EINVAL : 0;
}

/* ---- Bulk data, for whoever owns the slot ---- */

/* Between data and a stream, all or nothing: a reply is never cut short. */
static int np_vring_copy(np_vring *v, int stream, uint32_t head, uint64_t skip, uint8_t *data,
                         uint64_t len) {
    struct slot *slot = slot_in_flight(v, head);
    if (!slot)
        return -EINVAL;
    if (len > tail_of(slot, stream, skip).bytes)
        return -EMSGSIZE;
    copy(slot, stream, skip, data, len);
    return atomic_load(&v->memory->lost) ? -EFAULT : 0;
}

/* Moves up to count bytes between a file and a stream, as preadv2 and pwritev2 do; an error is
 * reported only if nothing was moved before it. */
static int64_t np_vring_move(np_vring *v, int stream, uint32_t head, uint64_t skip, int fd,
                             uint64_t count, int64_t offset, int flags) {
    struct iovec window[IOV_MAX];
    struct slot *slot = slot_in_flight(v, head);
    int64_t total = 0;
    if (!slot)
        return -EINVAL;
    struct tail tail = tail_of(slot, stream, skip);
    count = min(count, tail.bytes);
    while (count) {
        uint64_t wanted = 0;
        int pieces = 0;
        while (wanted < count && pieces < IOV_MAX) {
            window[pieces] = next_piece(&tail, count - wanted);
            wanted += window[pieces++].iov_len;
        }
        int64_t at = offset < 0 ? -1 : offset + total;
        ssize_t n = stream == NP_WRITABLE ? preadv2(fd, window, pieces, at, flags)
                                          : pwritev2(fd, window, pieces, at, flags);
        if (n < 0)
            return total ? total : -errno;
        total += n;
        count = (uint64_t)n < wanted ? 0 : count - wanted; /* a short transfer is the last one */
    }
    return total;
}
