/*
 * A fake guest in shared memory that runs one 9P workload against a live vhost-user server.
 *
 * A lane is one request that is always out: `depth` lanes make the queue depth. Each lane goes
 * through the steps of the workload (one message each) again and again; once through is one
 * operation. Buffers are laid out as by Linux (net/9p/trans_virtio.c): a header, and data of reads,
 * writes and directories in descriptors of one page each.
 *
 * Prints one JSON object (with --linger, stays connected and idle until standard input ends).
 * `cpu_ns` is what the server's process used meanwhile, spinning included.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <getopt.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { GPA = 1 << 20, LANES = 65, STEPS = 8, NAMES = 5, MSIZE = 512 * KIB, IO_HEADER = 11 };
#define USER_ADDRESS UINT64_C(0x7f0000000000)

/* ---- vhost-user ---- */

enum { VERSION = 1, NEED_REPLY = 8 };
enum {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18,
};
#define F_INDIRECT (UINT64_C(1) << 28)
#define F_EVENT_IDX (UINT64_C(1) << 29)
#define F_PROTOCOL (UINT64_C(1) << 30)
#define F_VERSION_1 (UINT64_C(1) << 32)
#define PROTOCOL_REPLY_ACK (UINT64_C(1) << 3)

struct header {
    uint32_t request, flags, size;
};

static int control;

static void send_message(uint32_t request, uint32_t flags, const void *body, uint32_t size,
                         int fd) {
    struct header header = {request, VERSION | flags, size};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)body, size}};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } room = {0};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (fd >= 0) {
        message.msg_control = &room;
        message.msg_controllen = sizeof room;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    check(sendmsg(control, &message, 0), "sendmsg");
}

static uint64_t receive_u64(uint32_t request) {
    struct {
        struct header header;
        uint64_t value;
    } __attribute__((packed)) reply;
    if (recv(control, &reply, sizeof reply, MSG_WAITALL) != sizeof reply ||
        reply.header.request != request)
        die("the server did not answer vhost-user request %u", request);
    return reply.value;
}

static uint64_t get(uint32_t request) {
    send_message(request, 0, NULL, 0, -1);
    return receive_u64(request);
}

static void set(uint32_t request, const void *body, uint32_t size, int fd, bool acknowledged) {
    send_message(request, acknowledged ? NEED_REPLY : 0, body, size, fd);
    if (acknowledged && receive_u64(request) != 0)
        die("the server refused vhost-user request %u", request);
}

static void set_u64(uint32_t request, uint64_t value, int fd, bool acknowledged) {
    set(request, &value, sizeof value, fd, acknowledged);
}

static void set_state(uint32_t request, uint32_t value) {
    uint32_t state[] = {0, value};
    set(request, state, sizeof state, -1, true);
}

/* ---- the ring ---- */

static struct {
    unsigned num, per_lane; /* per_lane: descriptors of a lane, when there are no indirect tables */
    bool indirect, spin;
    struct vring ring;
    uint16_t next_avail, kicked, last_used;
    int memory_fd, kick, call;
    uint8_t *memory;
    size_t size, data_span;
    uint64_t kicks, calls;
} guest = {.spin = true};

struct lane {
    struct vring_desc *table; /* indirect, or where it is prepared */
    uint8_t *request, *reply, *data;
    unsigned step;
    uint32_t fid;
    uint64_t cookie, turns, begun;
    bool once, finished;
};

static struct lane lanes[LANES];

static uint64_t guest_address(const void *pointer) {
    return (uint64_t)((const uint8_t *)pointer - guest.memory) + GPA;
}

static size_t page_up(size_t size) { return (size + PAGE - 1) & ~(size_t)(PAGE - 1); }

static uint8_t *take(size_t *at, size_t size) {
    uint8_t *result = guest.memory + *at;
    *at += page_up(size);
    return result;
}

static void lay_out(size_t data_span) {
    guest.data_span = data_span;
    guest.per_lane = (unsigned)(data_span / PAGE) + 2;
    guest.num = 128;
    while (!guest.indirect && guest.num < LANES * guest.per_lane)
        guest.num *= 2;
    size_t table = guest.per_lane * sizeof(struct vring_desc);
    size_t per_lane = page_up(table) + 2 * PAGE + page_up(data_span);
    size_t ring = page_up(vring_size(guest.num, PAGE));
    guest.size = ring + LANES * per_lane;
    guest.memory = shared_pages(guest.size, &guest.memory_fd);
    memset(guest.memory, 0, ring);
    vring_init(&guest.ring, guest.num, guest.memory, PAGE);
    size_t at = ring;
    for (unsigned i = 0; i < LANES; i++) {
        lanes[i].table = (struct vring_desc *)take(&at, table);
        lanes[i].request = take(&at, PAGE);
        lanes[i].reply = take(&at, PAGE);
        lanes[i].data = take(&at, data_span);
    }
}

static void connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("%s: too long for a socket", path);
    strcpy(address.sun_path, path);
    control = (int)check(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    check(connect(control, (struct sockaddr *)&address, sizeof address), path);
    guest.kick = (int)check(eventfd(0, EFD_CLOEXEC), "eventfd");
    guest.call = (int)check(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");

    uint64_t wanted = F_EVENT_IDX | F_PROTOCOL | F_VERSION_1 | (guest.indirect ? F_INDIRECT : 0);
    if ((get(GET_FEATURES) & wanted) != wanted)
        die("the server lacks a virtio feature");
    if (!(get(GET_PROTOCOL_FEATURES) & PROTOCOL_REPLY_ACK))
        die("the server lacks REPLY_ACK");
    set_u64(SET_PROTOCOL_FEATURES, PROTOCOL_REPLY_ACK, -1, false);
    set(SET_OWNER, NULL, 0, -1, true);
    set_u64(SET_FEATURES, wanted, -1, true);
    struct {
        uint32_t count, pad;
        uint64_t gpa, size, user_address, offset;
    } table = {1, 0, GPA, guest.size, USER_ADDRESS, 0};
    set(SET_MEM_TABLE, &table, sizeof table, guest.memory_fd, true);
    set_state(SET_VRING_NUM, guest.num);
    set_state(SET_VRING_BASE, 0);
    uint64_t base = USER_ADDRESS;
    uint64_t addresses[] = {0, base, base + (uint64_t)((uint8_t *)guest.ring.used - guest.memory),
                            base + (uint64_t)((uint8_t *)guest.ring.avail - guest.memory), 0};
    set(SET_VRING_ADDR, addresses, sizeof addresses, -1, true);
    set_u64(SET_VRING_KICK, 0, guest.kick, true);
    set_u64(SET_VRING_CALL, 0, guest.call, true);
    set_state(SET_VRING_ENABLE, 1);
}

static void put_pages(struct vring_desc *table, unsigned *count, const uint8_t *data, size_t size,
                      uint16_t flags) {
    for (size_t at = 0; at < size; at += PAGE) {
        uint32_t length = (uint32_t)(size - at < PAGE ? size - at : PAGE);
        table[(*count)++] = (struct vring_desc){guest_address(data + at), length, flags, 0};
    }
}

/* Makes a request available: header, `out` data bytes, room for a reply header and `in` bytes. */
static void submit(struct lane *lane, size_t out, size_t in) {
    struct vring_desc *table = lane->table;
    uint32_t size;
    memcpy(&size, lane->request, sizeof size);
    unsigned count = 0;
    table[count++] = (struct vring_desc){guest_address(lane->request), size - (uint32_t)out, 0, 0};
    put_pages(table, &count, lane->data, out, 0);
    table[count++] = (struct vring_desc){guest_address(lane->reply), in ? IO_HEADER : PAGE,
                                         VRING_DESC_F_WRITE, 0};
    put_pages(table, &count, lane->data, in, VRING_DESC_F_WRITE);

    unsigned index = (unsigned)(lane - lanes);
    unsigned head = guest.indirect ? index : index * guest.per_lane;
    unsigned first = guest.indirect ? 0 : head;
    for (unsigned i = 0; i + 1 < count; i++) {
        table[i].flags |= VRING_DESC_F_NEXT;
        table[i].next = (uint16_t)(first + i + 1);
    }
    if (guest.indirect)
        guest.ring.desc[head] = (struct vring_desc){
            guest_address(table), (uint32_t)(count * sizeof *table), VRING_DESC_F_INDIRECT, 0};
    else
        memcpy(guest.ring.desc + head, table, count * sizeof *table);
    guest.ring.avail->ring[guest.next_avail++ % guest.num] = (uint16_t)head;
}

/* Shows the server what was submitted, and wakes it if it asked for that. */
static void publish(void) {
    if (guest.next_avail == guest.kicked)
        return;
    __atomic_store_n(&guest.ring.avail->idx, guest.next_avail, __ATOMIC_RELEASE);
    atomic_thread_fence(memory_order_seq_cst);
    if (vring_need_event(vring_avail_event(&guest.ring), guest.next_avail, guest.kicked)) {
        guest.kicks++;
        check(eventfd_write(guest.kick, 1), "kick");
    }
    guest.kicked = guest.next_avail;
}

static bool none_used(void) {
    return __atomic_load_n(&guest.ring.used->idx, __ATOMIC_ACQUIRE) == guest.last_used;
}

/* Waits for a reply: actively, without interrupts, or asleep until one comes. */
static void wait_used(void) {
    if (guest.spin) {
        vring_used_event(&guest.ring) = (uint16_t)(guest.last_used - 1);
        uint64_t limit = 0;
        for (unsigned turn = 1; none_used(); turn++) {
            __builtin_ia32_pause();
            if (turn % (1 << 20) == 0) {
                if (!limit)
                    limit = now_ns() + UINT64_C(30000000000);
                if (now_ns() > limit)
                    die("no reply within 30 s");
            }
        }
        return;
    }
    while (none_used()) {
        vring_used_event(&guest.ring) = guest.last_used;
        atomic_thread_fence(memory_order_seq_cst);
        if (!none_used())
            return;
        struct pollfd wait = {guest.call, POLLIN, 0};
        if (poll(&wait, 1, 30000) != 1)
            die("no reply within 30 s");
        eventfd_t count;
        if (eventfd_read(guest.call, &count) == 0)
            guest.calls += count;
    }
}

static struct lane *take_used(void) {
    if (none_used())
        return NULL;
    uint32_t head = guest.ring.used->ring[guest.last_used++ % guest.num].id;
    return lanes + (guest.indirect ? head : head / guest.per_lane);
}

/* ---- 9P2000.L ---- */

enum {
    RLERROR = 7,
    TLOPEN = 12,
    TLCREATE = 14,
    TGETATTR = 24,
    TREADDIR = 40,
    TUNLINKAT = 76,
    TVERSION = 100,
    TATTACH = 104,
    TWALK = 110,
    TREAD = 116,
    TWRITE = 118,
    TCLUNK = 120,
};
enum { NOFID = 0xffffffff, ROOT = 0, TARGET = 1, FIRST_FID = 100, HELD_FID = 1000 };

/* Fields little endian, as this machine's. f: u32, l: u64, h: u16, n: a name. */
static void message(struct lane *lane, uint8_t type, size_t data, const char *fields, ...) {
    uint8_t *at = lane->request + 7;
    va_list arguments;
    va_start(arguments, fields);
    for (const char *field = fields; *field; field++) {
        if (*field == 'f') {
            uint32_t value = va_arg(arguments, uint32_t);
            memcpy(at, &value, sizeof value);
            at += sizeof value;
        } else if (*field == 'l') {
            uint64_t value = va_arg(arguments, uint64_t);
            memcpy(at, &value, sizeof value);
            at += sizeof value;
        } else if (*field == 'h') {
            uint16_t value = (uint16_t)va_arg(arguments, unsigned);
            memcpy(at, &value, sizeof value);
            at += sizeof value;
        } else {
            const char *name = va_arg(arguments, const char *);
            uint16_t length = (uint16_t)strlen(name);
            memcpy(at, &length, sizeof length);
            memcpy(at + sizeof length, name, length);
            at += sizeof length + length;
        }
    }
    va_end(arguments);
    uint32_t size = (uint32_t)(at - lane->request + (ptrdiff_t)data);
    uint16_t tag = type == TVERSION ? 0xffff : (uint16_t)(lane - lanes);
    memcpy(lane->request, &size, sizeof size);
    lane->request[4] = type;
    memcpy(lane->request + 5, &tag, sizeof tag);
}

static void expect(const struct lane *lane) {
    uint8_t type = lane->reply[4];
    if (type == lane->request[4] + 1)
        return;
    uint32_t code = 0;
    if (type == RLERROR)
        memcpy(&code, lane->reply + 7, sizeof code);
    die("message type %u was answered by type %u: %s", lane->request[4], type, strerror((int)code));
}

static void exchange(struct lane *lane) {
    submit(lane, 0, 0);
    publish();
    wait_used();
    if (take_used() != lane)
        die("a reply to nothing");
    expect(lane);
}

static void walk(struct lane *lane, uint32_t fid, const char *path) {
    char copy[256], *names[NAMES + 1], *rest = copy;
    unsigned count = 0;
    snprintf(copy, sizeof copy, "%s", path);
    while (count <= NAMES && (names[count] = strsep(&rest, "/")))
        if (*names[count])
            count++;
    switch (count) {
    case 0:
        message(lane, TWALK, 0, "ffh", ROOT, fid, 0);
        break;
    case 1:
        message(lane, TWALK, 0, "ffhn", ROOT, fid, 1, names[0]);
        break;
    case NAMES:
        message(lane, TWALK, 0, "ffhnnnnn", ROOT, fid, NAMES, names[0], names[1], names[2],
                names[3], names[4]);
        break;
    default:
        die("%s: a walk has 0, 1 or %d names here", path, NAMES);
    }
}

/* A walk that stopped short is an answer of the right type. */
static void expect_walk(const struct lane *lane) {
    uint16_t asked, found;
    memcpy(&asked, lane->request + 15, sizeof asked);
    memcpy(&found, lane->reply + 7, sizeof found);
    if (asked != found)
        die("a walk of %u names found %u", asked, found);
}

/* ---- workloads ---- */

enum step {
    END,
    GETATTR,
    WALK1,
    WALK5,
    CLONE,
    LOPEN,
    READ,
    WRITE,
    READDIR,
    LIST,
    CREATE,
    UNLINK,
    CLUNK
};

struct workload {
    const char *name;
    size_t io;        /* bytes of a read, write or readdir */
    const char *open; /* each lane's fid is opened on this beforehand */
    uint32_t flags;   /* of that open */
    enum step steps[STEPS];
};

static const struct workload workloads[] = {
    {"getattr", 0, NULL, 0, {GETATTR}},
    {"walk1", 0, NULL, 0, {WALK1, CLUNK}},
    {"walk5", 0, NULL, 0, {WALK5, CLUNK}},
    {"open-read", 4 * KIB, NULL, 0, {WALK1, LOPEN, READ, CLUNK}},
    {"read-4k", 4 * KIB, "file", 0, {READ}},
    {"read-64k", 64 * KIB, "file", 0, {READ}},
    {"read-508k", 508 * KIB, "file", 0, {READ}},
    {"write-4k", 4 * KIB, "file", 2, {WRITE}},
    {"write-64k", 64 * KIB, "file", 2, {WRITE}},
    {"write-508k", 508 * KIB, "file", 2, {WRITE}},
    {"readdir", 64 * KIB, "dir1000", 0, {READDIR, READDIR}},
    {"list", 500 * KIB, "many", 0, {LIST}},
    {"create-unlink", 0, NULL, 0, {CLONE, CREATE, CLUNK, UNLINK}},
};

static const struct workload *find(const char *name) {
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++)
        if (!strcmp(workloads[i].name, name))
            return workloads + i;
    die("%s: no such workload", name);
}

static void begin_step(struct lane *lane, const struct workload *workload) {
    uint64_t offset = lane->turns * LANES * workload->io + (uint64_t)(lane - lanes) * workload->io;
    char name[32];
    size_t out = 0, in = 0;
    offset %= FILE_SPAN - MSIZE;
    offset &= ~(uint64_t)(PAGE - 1);
    switch (workload->steps[lane->step]) {
    case GETATTR:
        message(lane, TGETATTR, 0, "fl", TARGET, UINT64_C(0x3fff));
        break;
    case WALK1:
        walk(lane, lane->fid, "small");
        break;
    case WALK5:
        walk(lane, lane->fid, "a/b/c/d/e");
        break;
    case CLONE:
        walk(lane, lane->fid, "");
        break;
    case LOPEN:
        message(lane, TLOPEN, 0, "ff", lane->fid, 0);
        break;
    case READ:
        in = workload->io;
        message(lane, TREAD, 0, "flf", lane->fid, workload->open ? offset : 0, (uint32_t)in);
        break;
    case WRITE:
        out = workload->io;
        message(lane, TWRITE, out, "flf", lane->fid, offset, (uint32_t)out);
        break;
    case READDIR:
        in = workload->io;
        message(lane, TREADDIR, 0, "flf", lane->fid, lane->step ? lane->cookie : 0, (uint32_t)in);
        break;
    case LIST:
        in = workload->io;
        message(lane, TREADDIR, 0, "flf", lane->fid, lane->cookie, (uint32_t)in);
        break;
    case CREATE:
        snprintf(name, sizeof name, "new%u", lane->fid);
        message(lane, TLCREATE, 0, "fnfff", lane->fid, name, 0x8042, 0644, 0);
        break;
    case UNLINK:
        snprintf(name, sizeof name, "new%u", lane->fid);
        message(lane, TUNLINKAT, 0, "fnf", ROOT, name, 0);
        break;
    case CLUNK:
        message(lane, TCLUNK, 0, "f", lane->fid);
        break;
    case END:
        die("a workload without steps");
    }
    submit(lane, out, in);
}

static uint32_t reply_count(const struct lane *lane) {
    uint32_t count;
    memcpy(&count, lane->reply + 7, sizeof count);
    return count;
}

/* Goes through the entries of an Rreaddir, as a guest does, for the offset of the last. */
static void read_entries(struct lane *lane) {
    for (uint32_t at = 0, end = reply_count(lane); at < end;) {
        uint16_t length;
        memcpy(&lane->cookie, lane->data + at + 13, sizeof lane->cookie);
        memcpy(&length, lane->data + at + 22, sizeof length);
        at += 24 + (uint32_t)length;
    }
}

/* Whether an operation has ended with it. */
static bool end_step(struct lane *lane, const struct workload *workload) {
    expect(lane);
    switch (workload->steps[lane->step]) {
    case WALK1:
    case WALK5:
        expect_walk(lane);
        break;
    case READ:
    case WRITE:
        if (reply_count(lane) != workload->io)
            die("%u bytes instead of %zu", reply_count(lane), workload->io);
        break;
    case READDIR: /* all of it, and then nothing */
        if ((reply_count(lane) == 0) != (lane->step == 1))
            die("the directory does not come in one piece");
        read_entries(lane);
        break;
    case LIST:
        if (reply_count(lane)) {
            read_entries(lane);
            return false;
        }
        lane->cookie = 0;
        break;
    default:
        break;
    }
    if (workload->steps[++lane->step] != END)
        return false;
    lane->step = 0;
    lane->turns++;
    return true;
}

static void open_path(struct lane *lane, uint32_t fid, const char *path, uint32_t flags) {
    walk(lane, fid, path);
    exchange(lane);
    expect_walk(lane);
    message(lane, TLOPEN, 0, "ff", fid, flags);
    exchange(lane);
}

static void attach(const struct workload *workload, unsigned depth) {
    message(lanes, TVERSION, 0, "fn", MSIZE, "9P2000.L");
    exchange(lanes);
    uint32_t msize;
    memcpy(&msize, lanes->reply + 7, sizeof msize);
    if (msize < workload->io + 24)
        die("the server agreed to an msize of only %u", msize);
    message(lanes, TATTACH, 0, "ffnnf", ROOT, NOFID, "", "", 0);
    exchange(lanes);
    walk(lanes, TARGET, "small");
    exchange(lanes);
    expect_walk(lanes);
    for (unsigned i = 0; i < depth; i++) {
        lanes[i].fid = FIRST_FID + i;
        if (workload->open)
            open_path(lanes, lanes[i].fid, workload->open, workload->flags);
    }
}

/* Takes a fid on each of the files 0 to count - 1 of the directory `many`. */
static void hold(uint32_t count) {
    char name[16];
    uint32_t dir = TARGET + 1;
    if (!count)
        return;
    walk(lanes, dir, "many");
    exchange(lanes);
    expect_walk(lanes);
    for (uint32_t i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%u", i);
        message(lanes, TWALK, 0, "ffhn", dir, HELD_FID + i, 1, name);
        exchange(lanes);
        expect_walk(lanes);
    }
}

/* ---- measuring ---- */

enum { SAMPLES_MAX = 1 << 23 };
static uint32_t *samples;
static size_t sample_count;

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static uint32_t percentile(double share) {
    size_t at = (size_t)((double)sample_count * share);
    return sample_count ? samples[at < sample_count ? at : sample_count - 1] : 0;
}

struct result {
    uint64_t requests, operations, ns;
};

/* Runs all lanes for a time; then finishes what is out. One that runs `once` is not counted. */
static struct result run(const struct workload *workload, unsigned depth, uint64_t length) {
    struct result result = {0};
    uint64_t start = now_ns(), now = start;
    unsigned out = 0;
    for (unsigned i = 0; i < LANES; i++) {
        if (i >= depth && (!lanes[i].once || lanes[i].finished))
            continue;
        lanes[i].begun = now;
        begin_step(lanes + i, workload);
        out++;
    }
    sample_count = 0;
    publish();
    while (out) {
        wait_used();
        now = now_ns();
        struct lane *lane;
        while ((lane = take_used())) {
            bool ended = end_step(lane, workload);
            if (lane->once) {
                lane->finished = true;
                out--;
                continue;
            }
            result.requests++;
            result.ns = now - start;
            if (ended) {
                result.operations++;
                uint64_t took = now - lane->begun;
                if (sample_count < SAMPLES_MAX)
                    samples[sample_count++] = (uint32_t)(took < UINT32_MAX ? took : UINT32_MAX);
                lane->begun = now;
                if (now - start >= length) {
                    out--;
                    continue;
                }
            }
            begin_step(lane, workload);
        }
        publish();
    }
    return result;
}

static long resident_kib(pid_t pid) {
    char path[64], line[256];
    long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        die("%s: %s", path, strerror(errno));
    while (fgets(line, sizeof line, file))
        sscanf(line, "VmRSS: %ld", &kib);
    fclose(file);
    return kib;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'},   {"pid", required_argument, NULL, 'p'},
        {"workload", required_argument, NULL, 'w'}, {"depth", required_argument, NULL, 'd'},
        {"ms", required_argument, NULL, 't'},       {"indirect", no_argument, NULL, 'i'},
        {"sleep", no_argument, NULL, 'a'},          {"hold", required_argument, NULL, 'h'},
        {"stall", required_argument, NULL, 'x'},    {"stalls", required_argument, NULL, 'n'},
        {"linger", no_argument, NULL, 'l'},         {0},
    };
    const char *path = NULL, *stall = NULL, *name = "getattr";
    unsigned depth = 1, stalls = 1;
    uint32_t held = 0;
    uint64_t length = 100;
    pid_t pid = 0;
    bool asleep = false, linger = false;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 's':
            path = optarg;
            break;
        case 'p':
            pid = atoi(optarg);
            break;
        case 'w':
            name = optarg;
            break;
        case 'd':
            depth = (unsigned)atoi(optarg);
            break;
        case 't':
            length = (uint64_t)atoll(optarg);
            break;
        case 'i':
            guest.indirect = true;
            break;
        case 'a':
            asleep = true;
            break;
        case 'h':
            held = (uint32_t)atoi(optarg);
            break;
        case 'x':
            stall = optarg;
            break;
        case 'n':
            stalls = (unsigned)atoi(optarg);
            break;
        case 'l':
            linger = true;
            break;
        default:
            return 2;
        }
    }
    if (!path || !pid || !depth || !stalls || depth + stalls > LANES)
        die("usage: ringdriver --socket PATH --pid PID [--workload NAME] [--depth 1..%d] "
            "[--ms TIME] [--indirect] [--sleep] [--hold FIDS] [--stall FILE [--stalls COUNT]] "
            "[--linger]",
            LANES - 1);
    const struct workload *workload = find(name);
    clockid_t cpu;
    if (clock_getcpuclockid(pid, &cpu))
        die("no process %d", pid);
    samples = calloc(SAMPLES_MAX, sizeof *samples);
    if (!samples)
        die("no memory");
    lay_out(page_up(workload->io));
    connect_to(path);
    attach(workload, depth);
    long before = resident_kib(pid);
    hold(held);
    long after = resident_kib(pid);
    guest.spin = !asleep;

    run(workload, depth, length * 100000); /* a tenth of the time, to warm up */
    for (unsigned i = LANES - stalls; stall && i < LANES; i++) {
        lanes[i].fid = FIRST_FID + i;
        open_path(lanes, lanes[i].fid, stall, workload->flags);
        lanes[i].once = true;
    }
    guest.kicks = guest.calls = 0;
    uint64_t waited = waited_ns(pid) + waited_ns(getpid()), cpu_start = clock_ns(cpu);
    struct result result = run(workload, depth, length * 1000000);
    uint64_t cpu_ns = clock_ns(cpu) - cpu_start;
    waited = waited_ns(pid) + waited_ns(getpid()) - waited;
    qsort(samples, sample_count, sizeof *samples, by_value);
    printf("{\"requests\": %lu, \"operations\": %lu, \"ns\": %lu, \"cpu_ns\": %lu, \"waited_ns\": "
           "%lu, "
           "\"p50_ns\": %u, \"p99_ns\": %u, \"p999_ns\": %u, \"max_ns\": %u, \"kicks\": %lu, "
           "\"calls\": %lu, \"rss_kib\": %ld, \"held_rss_kib\": %ld}\n",
           result.requests, result.operations, result.ns, cpu_ns, waited, percentile(0.5),
           percentile(0.99), percentile(0.999), percentile(1), guest.kicks, guest.calls, before,
           after);
    fflush(stdout);
    if (linger) /* connected and idle until standard input ends */
        while (getchar() != EOF)
            continue;
    return 0;
}
