/*
 * The table of guest memory, and the dirty log, as a front end sets them up: real files, really
 * mapped, and truncated below what is mapped. A plain list of regions beside it says what each
 * address must lead to.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "harness.h"
#include "sources.h"

enum { FILES = 2, FILE_SIZE = 1 << 16, PAGE = 4096, KNOWN_MAX = 16 };

static int files[FILES];

static struct known {
    uint64_t gpa, ua, size, offset;
    int file;
} known[KNOWN_MAX];
static uint32_t count;
static bool truncated; /* what is mapped may be holes by now */

static uint8_t content(int file, uint64_t offset) {
    return (uint8_t)(offset / PAGE * 16 + (uint64_t)file + 1);
}

static void make_files(void) {
    for (int file = 0; file < FILES; file++) {
        uint8_t page[PAGE];
        files[file] = memfd_create("fuzz", 0);
        for (uint64_t at = 0; at < FILE_SIZE; at += PAGE) {
            memset(page, content(file, at), PAGE);
            REQUIRE(pwrite(files[file], page, PAGE, (off_t)at) == PAGE);
        }
    }
}

/* Numbers as front ends have them, or as they come: regions often touch. */
static uint64_t number(uint16_t given) {
    if (given >> 14 == 3)
        return UINT64_MAX - (given & 0x3fff) * UINT64_C(16);
    return given >> 14 == 2 ? (uint64_t)given << 48 : (given & 0x3fff) * UINT64_C(16);
}

static bool meet(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len) {
    return (a <= b && b - a < a_len) || (b <= a && a - b < b_len);
}

static int expected(const struct known *new, uint32_t *at) {
    if (!new->size || new->size > INT64_MAX || new->offset > INT64_MAX - new->size ||
        new->gpa + new->size < new->gpa || new->ua + new->size < new->ua)
        return -EINVAL;
    *at = count;
    for (uint32_t i = 0; i < count; i++) {
        const struct known *old = &known[i];
        if (old->gpa == new->gpa && old->size == new->size && old->ua == new->ua)
            *at = i;
        else if (meet(old->gpa, old->size, new->gpa, new->size) ||
                 meet(old->ua, old->size, new->ua, new->size))
            return -EEXIST;
    }
    return new->offset + new->size > FILE_SIZE ? -ENXIO : 0;
}

static void add(np_memory *memory, const struct record *r) {
    struct known new = {.gpa = number((uint16_t)r->d),
                        .ua = number((uint16_t)(r->d >> 16)),
                        .size = number(r->b),
                        .offset = number((uint16_t)r->c),
                        .file = r->a % FILES};
    uint32_t at = 0;
    int right = expected(&new, &at);
    if (at == KNOWN_MAX)
        return;
    REQUIRE(np_memory_add(memory, new.gpa, new.size, new.ua, new.offset, files[new.file]) == right);
    if (right)
        return;
    count += at == count;
    known[at] = new;
}

static void take_away(np_memory *memory, const struct record *r) {
    if (!count || r->a & 1) {
        uint64_t gpa = number((uint16_t)r->d);
        bool there = false;
        for (uint32_t i = 0; i < count; i++)
            there |= known[i].gpa == gpa && known[i].size == 1 && known[i].ua == gpa;
        REQUIRE(there || np_memory_remove(memory, gpa, 1, gpa) == -ENOENT);
        return;
    }
    struct known *old = &known[r->b % count];
    REQUIRE(np_memory_remove(memory, old->gpa, old->size, old->ua) == 0);
    *old = known[--count];
}

/* Where an address leads, by the list. */
static const struct known *owner(uint64_t address, bool user) {
    for (uint32_t i = 0; i < count; i++)
        if (address - (user ? known[i].ua : known[i].gpa) < known[i].size)
            return &known[i];
    return NULL;
}

static void look(np_memory *memory, const struct record *r) {
    uint64_t address = number((uint16_t)r->d) + (r->d >> 16 & 15), len = 1 + r->c % 70000;
    uint32_t hint = r->b;
    bool user = r->a & 1;
    const struct known *region = owner(address, user);
    uint64_t at = region ? address - (user ? region->ua : region->gpa) : 0;
    uint64_t together = region && len > region->size - at ? region->size - at : len;
    uint64_t found_len = len;
    uint8_t *found =
        user ? find_ua(memory, address, len) : resolve(memory, address, &found_len, &hint);
    if (!region || (user && together < len)) {
        REQUIRE(!found);
        return;
    }
    REQUIRE(found && (user || found_len == together));
    for (uint64_t i = 0; i < together; i += i + 1 < together && i + 512 >= together ? 1 : 512) {
        uint8_t byte = *(volatile uint8_t *)(found + i);
        REQUIRE(truncated || byte == content(region->file, region->offset + at + i));
    }
}

/* A hole is found by touching it, and told. */
static void truncate_below(np_memory *memory, const struct record *r) {
    int file = r->a % FILES;
    uint64_t keep = r->b % FILE_SIZE & ~(uint64_t)(PAGE - 1);
    REQUIRE(ftruncate(files[file], (off_t)keep) == 0);
    truncated = true;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t hint = 0;
        uint64_t len = known[i].size;
        volatile uint8_t *host = resolve(memory, known[i].gpa, &len, &hint);
        REQUIRE(host && len == known[i].size);
        (void)host[len - 1];
        REQUIRE(known[i].file != file || known[i].offset + len - 1 < keep ||
                atomic_load(&memory->lost));
    }
    REQUIRE(ftruncate(files[file], FILE_SIZE) == 0);
    for (uint64_t at = keep; at < FILE_SIZE; at += PAGE) {
        uint8_t page[PAGE];
        memset(page, content(file, at), PAGE);
        REQUIRE(pwrite(files[file], page, PAGE, (off_t)at) == PAGE);
    }
}

/* A log of its own memory, whose bits are those of the pages that were written, and no others. */
static void log_writes(const struct record *r) {
    int fd = memfd_create("log", 0);
    uint64_t size = 1 + r->b % 64, first = r->d / NP_LOG_PAGE, len = r->c % 100000,
             last = len ? (r->d + len - 1) / NP_LOG_PAGE : 0, skipped = 0;
    np_log *log = np_log_new();
    REQUIRE(log && fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    REQUIRE(np_log_map(log, size + 1, 0, fd) == -ENXIO);
    REQUIRE(np_log_map(log, size, 0, fd) == 0);
    np_log_set_signal(log, -1);
    if (r->d <= UINT64_MAX - len) {
        mark_dirty(log, r->d, len);
        announce_marks(log);
        for (uint64_t page = 0; page < 8 * size; page++) {
            bool marked = log->shared.host[page / 8] >> page % 8 & 1;
            REQUIRE(marked == (len && page >= first && page <= last));
        }
        for (uint64_t page = first; len && page <= last; page++)
            skipped += page >= 8 * size;
        REQUIRE(np_log_skipped(log) == skipped);
    }
    np_log_free(log);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input = {data, size};
    if (!files[0])
        make_files();
    np_memory *memory = np_memory_new();
    REQUIRE(memory);
    count = 0;
    truncated = false;
    while (input.size) {
        struct record r = next_record(&input);
        switch (r.op % 8) {
        case 0:
        case 1:
        case 2:
            add(memory, &r);
            break;
        case 3:
            take_away(memory, &r);
            break;
        case 4:
            truncate_below(memory, &r);
            break;
        case 5:
            log_writes(&r);
            break;
        case 6:
            if (r.a % 16 == 0) {
                np_memory_clear(memory);
                count = 0;
                truncated = false;
            }
            break;
        default:
            look(memory, &r);
        }
    }
    np_memory_free(memory);
    return 0;
}
