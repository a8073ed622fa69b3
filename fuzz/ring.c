/*
 * The ring and its chains under a guest that writes what it likes, when it likes.
 *
 * An input is a ring's configuration and steps. The guest writes descriptors, tables and indices,
 * and asks for writes that come while the device reads (guest.h). The device waits, copies, moves
 * and pushes; between, the front end takes memory away, brings it back and starts a log. What must
 * hold after each step of the device stands in `check_writes` and beside the steps.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "guest.h"
#include "sources.h"

#include <sys/eventfd.h>

enum { PAGE_LOG_MAX = 64, UA = 0x10000000 };

static struct rig {
    np_memory memory;
    np_vring *vring;
    np_vring_config config;
    np_counters counters;
    np_stats stats;
    np_log log;
    bool log_everything;     /* also the used ring, and where it is */
    uint64_t used, used_len; /* guest physical */
    uint64_t table;          /* the indirect table that steps write to */
    uint32_t *writable;      /* by slot: bytes of a request in flight, plus one */
    uint32_t in_flight, done;
    uint16_t avail_index;
    int kick, call, wake;
} rig;

/* ---- The rig ---- */

/* As np_memory_add leaves it: sorted, and without the regions that are not shared. */
static void share_memory(void) {
    rig.memory.count = 0;
    for (int i = 0; i < REGIONS; i++) {
        const struct guest_region *region = &guest.regions[i];
        if (region->bytes)
            rig.memory.regions[rig.memory.count++] =
                (struct region){region->gpa, region->ua, region->size, {.host = region->bytes}};
    }
}

static uint64_t user_address(uint64_t gpa) {
    const struct guest_region *region = guest_region_at(gpa);
    return region ? region->ua + (gpa - region->gpa) : gpa;
}

static void set_up_memory(const struct record *config, const uint16_t sizes[REGIONS]) {
    uint16_t gaps = (uint16_t)(config->d >> 48);
    uint64_t gpa = 0x1000 + (gaps & 7) * 0x800;
    for (int i = 0; i < REGIONS; i++) {
        struct guest_region *region = &guest.regions[i];
        region->size = sizes[i] + UINT64_C(1);
        region->gpa = i == 2 && gaps & 0x8000 ? -region->size : gpa;
        region->ua = UA + (uint64_t)i * 0x100000;
        gpa = region->gpa + region->size + (gaps >> (3 + 4 * i) & 15) * 0x100;
        guest_share(region);
    }
    share_memory();
}

static void set_up(struct input *input) {
    struct record c = next_record(input);
    uint32_t num = c.a & 0x80 ? c.c & 0xffff : UINT32_C(1) << (c.a & 7);
    uint32_t desc_len = 16 * num, avail_len = 6 + 2 * num, used_len = 6 + 8 * num;
    uint64_t used_at = (desc_len + avail_len + 3) & ~UINT32_C(3);
    uint16_t most = c.op & 0x10 ? 0x7fff : 0xfff; /* large memory takes its time */
    uint16_t sizes[REGIONS] = {(uint16_t)c.d & most, (uint16_t)(c.d >> 16) & most,
                               (uint16_t)(c.d >> 32) & most};
    if (num <= 128 && !(c.op & 0x20)) /* the ring's own parts have room, unless it is to be odd */
        sizes[0] = (uint16_t)(sizes[0] + used_at + used_len);
    set_up_memory(&c, sizes);
    uint64_t first = guest.regions[0].gpa;
    uint64_t parts[3] = {first, first + desc_len, first + used_at};
    if (c.op & 0x20) {
        struct record odd = next_record(input);
        parts[0] = guest_address(odd.c & 0x3ffff);
        parts[1] = guest_address((uint64_t)odd.a << 32 | odd.b);
        parts[2] = guest_address(odd.d);
    }
    uint32_t header_stride = 7 + (c.c >> 16 & 0x3f), slots = num && num <= NP_RING_MAX ? num : 1;
    uint32_t reply_stride = 7 + (c.c >> 24);
    rig.config = (np_vring_config){
        .num = num,
        .desc = user_address(parts[0]),
        .avail = user_address(parts[1]),
        .used = user_address(parts[2]),
        .base = c.b,
        .event_idx = c.op & 1,
        .indirect = !(c.op & 2),
        .kick = c.op & 0x40 ? -1 : rig.kick,
        .call = c.op & 4 ? -1 : rig.call,
        .wake = rig.wake,
        .header_stride = header_stride,
        .reply_stride = reply_stride,
        .batch = 1 + (c.c >> 8 & 0x3f),
        .headers = exactly((size_t)slots * header_stride),
        .replies = exactly((size_t)slots * reply_stride),
        .done = exactly(slots * sizeof(np_done)),
        .counters = &rig.counters,
        .stats = &rig.stats,
    };
    rig.config.requests = exactly(rig.config.batch * sizeof(np_request));
    for (int type = 0; type < NP_MESSAGE_TYPES; type++)
        rig.config.limits[type] = (uint16_t)(7 + (uint32_t)type % (header_stride - 6));
    rig.writable = exactly(slots * sizeof *rig.writable);
    rig.counters = (np_counters){0};
    rig.avail_index = c.b;
    rig.used = parts[2];
    rig.used_len = used_len;
    rig.table = guest.regions[1].gpa;
    rig.in_flight = rig.done = 0;
    rig.log = (np_log){.signal = -1};
    rig.log_everything = false;
    rig.vring = np_vring_new(&rig.memory, &rig.config);
    REQUIRE(rig.vring);
}

static void tear_down(void) {
    np_vring_free(rig.vring);
    for (int i = 0; i < REGIONS; i++)
        guest_unshare(&guest.regions[i]);
    free(rig.log.shared.host);
    free(rig.config.headers);
    free(rig.config.replies);
    free(rig.config.requests);
    free(rig.config.done);
    free(rig.writable);
    memset(&guest, 0, sizeof guest);
    atomic_store(&rig.memory.lost, NOTHING_LOST);
}

/* ---- What the device may write ---- */

/* The used ring, and the writable buffers of what was in flight before the step. */
struct permission {
    uint64_t gpa, len;
};

static bool may_write(uint64_t gpa) {
    if (gpa - rig.used < rig.used_len)
        return true;
    for (uint32_t i = 0; i < rig.vring->fresh; i++) {
        const struct slot *slot = &rig.vring->slots[i];
        const struct segment *segment = slot->segments + slot->stream[NP_READABLE].count;
        for (uint32_t at = 0; slot->segments && at < slot->stream[NP_WRITABLE].count; at++)
            if (gpa - segment[at].gpa < segment[at].len)
                return true;
    }
    return false;
}

static bool is_logged(uint64_t gpa) {
    uint64_t page = gpa / NP_LOG_PAGE;
    if (!rig.vring->chains.log || page / 8 >= rig.log.size)
        return true;
    if (gpa - rig.used < rig.used_len && !rig.log_everything)
        return true;
    return rig.log.shared.host[page / 8] >> page % 8 & 1;
}

/* After each step of the device: it has written where it may, and the log says so. */
static void check_writes(void) {
    for (int i = 0; i < REGIONS; i++) {
        struct guest_region *region = &guest.regions[i];
        if (!region->bytes || !memcmp(region->bytes, region->shadow, region->size))
            continue;
        for (uint64_t at = 0; at < region->size; at++)
            if (region->bytes[at] != region->shadow[at]) {
                REQUIRE(may_write(region->gpa + at));
                REQUIRE(is_logged(region->gpa + at));
            }
        memcpy(region->shadow, region->bytes, region->size);
    }
    uint32_t in_flight = 0;
    for (uint32_t i = 0; i < rig.vring->fresh; i++)
        in_flight += rig.vring->slots[i].in_flight;
    REQUIRE(in_flight == rig.in_flight && in_flight == rig.counters.in_flight);
}

/* ---- Steps of the device ---- */

static void step_wait(const struct record *r) {
    const uint64_t one = 1;
    if (r->a & 1)
        np_signal(rig.wake);
    else
        np_vring_wake(rig.vring);
    if (r->a & 2)
        REQUIRE(write(rig.kick, &one, sizeof one) == sizeof one);
    bool was_broken = np_vring_broken(rig.vring)[0];
    int count = np_vring_wait(rig.vring, r->a >> 2 & 1);
    REQUIRE(count >= -1 && count <= (int)rig.config.batch);
    REQUIRE(count >= 0 || np_vring_broken(rig.vring)[0]);
    REQUIRE(!was_broken || count < 0);
    for (int i = 0; i < count; i++) {
        const np_request *request = &rig.config.requests[i];
        REQUIRE(request->slot < rig.config.num && !rig.writable[request->slot]);
        REQUIRE(request->header_len <= rig.config.header_stride);
        REQUIRE(request->header_len <= request->readable);
        REQUIRE(request->fault == 0 || request->fault == EFAULT || request->fault == E2BIG ||
                request->fault == EBADMSG);
        rig.writable[request->slot] = request->writable + 1;
        rig.in_flight++;
    }
    REQUIRE(rig.in_flight <= rig.config.num);
}

static void step_copy(const struct record *r) {
    uint64_t len = r->c & 0xffff, skip = r->c >> 31 ? r->d : r->d & 0xffff;
    uint8_t *data = exactly(len);
    int result = np_vring_copy(rig.vring, r->a & 1, r->b, skip, data, len);
    REQUIRE(result <= 0);
    free(data);
}

static void step_move(const struct record *r) {
    uint64_t skip = r->c & 0xffff, count = r->d >> 63 ? r->d : r->d & 0xffff;
    int64_t offset = r->a & 2 ? -1 : (int64_t)(r->d >> 16 & 0xffff), moved;
    guest_file_outcome = r->c >> 16;
    if (r->a & 4)
        moved = np_vring_write(rig.vring, r->b, skip, GUEST_FILE, count, offset, 1);
    else
        moved = np_vring_move(rig.vring, r->a & 1, r->b, skip, GUEST_FILE, count, offset, 0);
    REQUIRE(moved < 0 || (uint64_t)moved <= count);
}

static void step_done(const struct record *r) {
    uint32_t slots = rig.config.num && rig.config.num <= NP_RING_MAX ? rig.config.num : 1;
    if (rig.done == slots)
        return;
    uint64_t whole = (uint64_t)r->b << (NP_USED_BITS + NP_COPY_BITS + NP_TYPE_BITS) |
                     (uint64_t)r->a << (NP_USED_BITS + NP_COPY_BITS) |
                     (uint64_t)(r->c & 0xfff) << NP_USED_BITS | (r->d & 0xfffffff);
    rig.config.done[rig.done++] = (np_done)(whole & INT64_MAX);
}

/* What the documentation of np_vring_push says: those before the first bad one are returned. */
static void step_push(const struct record *r) {
    uint32_t count = r->a & 1 ? rig.done + r->b : rig.done, good = 0;
    uint16_t index = rig.counters.used_index;
    int result = np_vring_push(rig.vring, count);
    if (result != -EFAULT && count <= rig.config.num)
        for (; good < count; good++) {
            struct reply done = unpack((uint64_t)rig.config.done[good]);
            uint32_t room = done.slot < rig.config.num ? rig.writable[done.slot] : 0;
            if (!room || done.used_len >= room || done.copy_len >= room ||
                done.copy_len > rig.config.reply_stride || (done.type && done.copy_len < PREFIX))
                break;
            rig.writable[done.slot] = 0;
            rig.in_flight--;
        }
    REQUIRE(result == -EFAULT || result == (good < count ? -EINVAL : 0));
    REQUIRE((uint16_t)(rig.counters.used_index - index) == good);
    rig.done = 0;
}

/* ---- Steps of the guest and of the front end ---- */

static void step_descriptor(const struct record *r, uint64_t table) {
    struct descriptor d = {.addr = guest_address(r->d),
                           .len = r->a & 0x80 ? r->c : r->c & 0xffff,
                           .flags = r->a & 7,
                           .next = r->b >> 8};
    guest_write(table + (r->b & 0xff) * DESC_SIZE, &d, DESC_SIZE);
}

/* Many descriptors of one kind, as no mutation would write one by one. */
static void step_table(const struct record *r) {
    rig.table = guest_address(r->d);
    for (uint16_t i = 0; i < r->c % 1100; i++) {
        struct descriptor d = {.addr =
                                   guest.regions[r->a % REGIONS].gpa + (uint64_t)i * (r->b & 0xff),
                               .len = r->b >> 8,
                               .flags = (r->a & DESC_WRITE) | DESC_NEXT,
                               .next = i + 1};
        guest_write(rig.table + i * UINT64_C(16), &d, DESC_SIZE);
    }
}

static void step_offer(const struct record *r) {
    uint64_t avail = guest.regions[0].gpa + UINT64_C(16) * rig.config.num;
    uint16_t at = rig.config.num ? rig.avail_index % rig.config.num : 0;
    guest_write(avail + 4 + UINT64_C(2) * at, &r->b, sizeof r->b);
    rig.avail_index = r->a & 0x80 ? (uint16_t)r->c : (uint16_t)(rig.avail_index + 1);
    guest_write(avail + 2, &rig.avail_index, sizeof rig.avail_index);
}

static void step_meddle(const struct record *r) {
    for (int i = 0; i < MEDDLINGS; i++)
        if (!guest.meddlings[i].delay) {
            guest.meddlings[i] = (struct meddling){
                .delay = r->a, .size = 1 << (r->b & 3), .gpa = guest_address(r->d), .value = r->c};
            return;
        }
}

static void step_message(const struct record *r) {
    uint8_t header[PREFIX] = {0};
    memcpy(header, &r->c, 4);
    header[TYPE] = r->a;
    memcpy(header + TAG, &r->b, 2);
    guest_write(guest_address(r->d), header, sizeof header);
}

static void step_memory(const struct record *r) {
    struct guest_region *region = &guest.regions[r->a % REGIONS];
    if (region->bytes && !(r->a & 0x80))
        guest_unshare(region);
    else if (!region->bytes)
        guest_share(region);
    share_memory();
    int result = np_vring_relocate(rig.vring, &rig.memory);
    REQUIRE((result < 0) == (np_vring_broken(rig.vring)[0] != 0));
    np_vring_continues(rig.vring);
}

static void step_log(const struct record *r) {
    free(rig.log.shared.host);
    rig.log = (np_log){.signal = r->a & 8 ? rig.call : -1, .size = 1 + r->b % PAGE_LOG_MAX};
    rig.log.signal_kind = signal_kind(rig.log.signal);
    rig.log.shared.host = exactly(rig.log.size);
    rig.log_everything = r->a & 1 && !(r->a & 2);
    np_vring_set_log(rig.vring, r->a & 4 ? NULL : &rig.log, r->a & 1, r->a & 2 ? r->d : rig.used);
}

static void step(const struct record *r) {
    uint64_t poked = r->c;
    switch (r->op % 16) {
    case 0:
        step_descriptor(r, guest.regions[0].gpa);
        break;
    case 1:
        step_descriptor(r, rig.table);
        break;
    case 2:
        step_table(r);
        break;
    case 3:
        step_offer(r);
        break;
    case 4:
        guest_write(guest_address(r->d), &poked, UINT64_C(1) << (r->a & 3));
        break;
    case 5:
        step_meddle(r);
        break;
    case 6:
        step_message(r);
        break;
    case 7:
        step_wait(r);
        break;
    case 8:
        step_copy(r);
        break;
    case 9:
        step_move(r);
        break;
    case 10:
        step_done(r);
        break;
    case 11:
        step_push(r);
        break;
    case 12:
        step_memory(r);
        break;
    case 13:
        step_log(r);
        break;
    case 14:
        atomic_store(&rig.memory.lost, r->a & 1 ? (r->a & 2 ? POISONED : TRUNCATED) : NOTHING_LOST);
        break;
    default:
        np_vring_set_call(rig.vring, r->a & 1 ? rig.call : -1);
    }
    check_writes();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input = {data, size};
    uint64_t count;
    if (!rig.wake) {
        rig.kick = eventfd(0, EFD_NONBLOCK);
        rig.call = eventfd(0, EFD_NONBLOCK);
        rig.wake = eventfd(0, EFD_NONBLOCK);
    }
    set_up(&input);
    /* A ring that cannot work is not used by vring.py either. */
    while (input.size && !(np_vring_broken(rig.vring)[0] && !rig.vring->slots)) {
        struct record r = next_record(&input);
        step(&r);
    }
    tear_down();
    if (read(rig.kick, &count, sizeof count) < 0 || read(rig.wake, &count, sizeof count) < 0)
        errno = 0; /* neither was signalled: as good */
    return 0;
}
