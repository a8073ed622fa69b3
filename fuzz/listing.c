/*
 * Listing a directory whose entries, positions and attributes come from a hostile file system
 * (directory.h), by a client that goes on from whichever cookie it likes.
 *
 * An input is how to list, then a record for each entry, then one for each request of the client.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "directory.h"
#include "sources.h"

enum { FIXED = 24, CHOICES = 64, COOKIES = 8192 };

static uint64_t get(const uint8_t *from, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)from[i] << (8 * i);
    return value;
}

static int entry_at(uint64_t position) {
    for (uint32_t i = 0; i < directory.count; i++)
        if (position_of(i) == position)
            return (int)i;
    return -1;
}

/* A run is whole entries of the directory, each with a cookie that leads back to its position. */
static uint32_t check_run(nd_cookies *cookies, const uint8_t *run, uint32_t size,
                          uint64_t chosen[CHOICES]) {
    uint32_t count = 0;
    for (uint32_t at = 0; at < size; count++) {
        REQUIRE(size - at > FIXED);
        uint32_t length = (uint32_t)get(run + at + 22, 2);
        uint64_t cookie = get(run + at + 13, 8), position;
        REQUIRE(length && length <= size - at - FIXED);
        REQUIRE(!memchr(run + at + FIXED, 0, length) && !memchr(run + at + FIXED, '/', length));
        REQUIRE(cookie < 2 * (uint64_t)ND_COOKIE_LIMIT);
        REQUIRE(nd_position(cookies, cookie, &position) == 0);
        int entry = entry_at(position);
        REQUIRE(entry >= 0);
        REQUIRE(!strncmp(directory.entries[entry].name, (const char *)run + at + FIXED, length));
        chosen[count % CHOICES] = cookie;
        at += FIXED + length;
    }
    return count;
}

/* What a client that seeks in its last run is given: whole entries behind its cookie. */
static void check_behind(nd_cookies *cookies, const uint8_t *run, uint32_t size, uint64_t cookie,
                         uint32_t room) {
    uint64_t unused[CHOICES];
    uint32_t start = 0, length = nd_entries_behind(run, size, cookie, room, &start);
    REQUIRE(length <= room || (length == 0));
    REQUIRE(start <= size && length <= size - start);
    check_run(cookies, run + start, length, unused);
}

/* Another daemon takes over: its cookies mean the same. */
static nd_cookies *handed_over(nd_cookies *old) {
    nd_cookies *new = nd_cookies_new(COOKIES);
    uint32_t base, count = nd_cookies_dump(old, NULL, 0, &base);
    uint64_t *positions = exactly(count * sizeof *positions);
    REQUIRE(new && nd_cookies_dump(old, positions, count, &base) == count);
    REQUIRE(nd_cookies_load(new, positions, count, base) == 0);
    free(positions);
    nd_cookies_free(old);
    return new;
}

/* The encoders of what statx and the extended attributes say. */
static void check_encoders(const struct record *r, const nd_qid_table *table) {
    uint8_t *body = exactly(ND_GETATTR_BODY), *handle = exactly(ND_HANDLE_MAX);
    nd_owner owner;
    nd_stat status;
    int length = nd_file_handle(3, handle);
    REQUIRE(length <= ND_HANDLE_MAX);
    nd_stat_at(3, "", 1, &status);
    nd_getattr(3, table, r->d, body);
    nd_getattr_as(3, r->d, r->d, body);
    if (nd_owner_of(3, &owner) == 0)
        nd_put_owner(body, owner.uid, owner.gid, owner.mode, owner.rdev);
    free(body);
    free(handle);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input = {data, size};
    struct record config = next_record(&input);
    uint64_t devices = config.a & 3, chosen[CHOICES] = {0}, offset = 0;
    nd_qid_table *table = exactly(sizeof *table + devices * sizeof *table->devices);
    nd_cookies *cookies = nd_cookies_new(COOKIES);
    table->count = devices;
    for (uint64_t i = 0; i < devices; i++) /* the directory's own comes first */
        table->devices[i] = (nd_qid_device){makedev(i, 0), (i + 1) << 48};
    directory.count = 0;
    directory.hashed = config.op & 1;
    for (uint32_t i = 0; i < config.b % (ENTRIES_MAX + 1) && input.size; i++)
        add_entry(next_record(&input));
    check_encoders(&config, table);
    do {
        struct record r = next_record(&input);
        uint32_t room = r.c & 0xffff;
        uint8_t *out = exactly(room);
        const char *covered = config.op & 2 && directory.count ? directory.entries[0].name : "";
        char *names = exactly(strlen(covered) + 2);
        memcpy(names, covered, strlen(covered));
        int64_t got = nd_readdir(3, offset, config.op >> 2 & 1, config.op >> 3 & 3, names,
                                 config.op >> 5 & 1, table, cookies, out, room);
        REQUIRE(got <= (int64_t)room && got > -4096);
        uint32_t count = got > 0 ? check_run(cookies, out, (uint32_t)got, chosen) : 0;
        if (count > CHOICES)
            count = CHOICES;
        if (got > 0)
            check_behind(cookies, out, (uint32_t)got, count ? chosen[r.b % count] : 0, r.d & 0xfff);
        if (config.op & 0x40)
            cookies = handed_over(cookies);
        uint64_t cookie = r.a & 1 || !count ? r.d : chosen[r.a % count];
        if (nd_position(cookies, cookie, &offset) < 0)
            offset = 0;
        free(out);
        free(names);
    } while (input.size);
    nd_cookies_free(cookies);
    free(table);
    return 0;
}
