/*
 * Directories: runs of Rreaddir entries, and the numbers that stand for positions in them.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef-begin */
typedef struct nd_cookies nd_cookies;

/* Which entries are looked up: only names that something is mounted on, directories too, or all. */
enum { ND_LOOK_COVERED, ND_LOOK_DIRECTORIES, ND_LOOK_ALL };
/* Positions below are cookies themselves; numbers of others lie between this and its double. */
enum { ND_COOKIE_LIMIT = 1 << 30 };

nd_cookies *nd_cookies_new(uint32_t most);
void nd_cookies_free(nd_cookies *cookies);
uint32_t nd_cookies_dump(nd_cookies *cookies, uint64_t *positions, uint32_t room, uint32_t *base);
int nd_cookies_load(nd_cookies *cookies, const uint64_t *positions, uint32_t count, uint32_t base);
int nd_position(nd_cookies *cookies, uint64_t cookie, uint64_t *position);
int nd_shorten(nd_cookies *cookies, uint8_t *entries, uint32_t size);
int64_t nd_readdir(int fd, uint64_t offset, int at_root, int look_up, const char *covered,
                   int mapped, const nd_qid_table *table, nd_cookies *cookies, uint8_t *out,
                   uint32_t size);
int64_t nd_getdents(int fd, uint64_t offset, uint8_t *out, uint32_t size);
uint32_t nd_entries_behind(const uint8_t *run, uint32_t size, uint64_t cookie, uint32_t room,
                           uint32_t *start);
/* cdef-end */

enum { COOKIE_AT = 13, ENTRY_FIXED = 13 + 8 + 1 + 2, FIRST_ROOM = 256 };

/*
 * Cookies of one directory. Number `base + i` stands for positions[i]; `slots` finds i + 1 by
 * position, open addressing, at most half full. When `most` are known, the older half is
 * forgotten, so that neither a huge directory nor one whose entries come and go takes more memory:
 * only a seek that far back fails.
 */
struct nd_cookies {
    pthread_mutex_t lock;
    uint64_t *positions;
    uint32_t *slots;
    uint32_t base, count, room, most;
};

nd_cookies *nd_cookies_new(uint32_t most) {
    nd_cookies *cookies = calloc(1, sizeof *cookies);
    if (cookies) {
        pthread_mutex_init(&cookies->lock, NULL);
        cookies->most = most;
    }
    return cookies;
}

void nd_cookies_free(nd_cookies *cookies) {
    free(cookies->positions);
    free(cookies->slots);
    pthread_mutex_destroy(&cookies->lock);
    free(cookies);
}

/* The slot of a position, or the free one where it belongs. */
static uint32_t *slot_of(const nd_cookies *cookies, uint64_t position) {
    uint32_t mask = 2 * cookies->room - 1;
    uint32_t at = (uint32_t)((position * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & mask;
    while (cookies->slots[at] && cookies->positions[cookies->slots[at] - 1] != position)
        at = (at + 1) & mask;
    return &cookies->slots[at];
}

static void fill_slots(nd_cookies *cookies) {
    memset(cookies->slots, 0, 2 * (size_t)cookies->room * sizeof *cookies->slots);
    for (uint32_t i = 0; i < cookies->count; i++)
        *slot_of(cookies, cookies->positions[i]) = i + 1;
}

static int make_room(nd_cookies *cookies) {
    if (cookies->count == cookies->most) {
        uint32_t half = cookies->count / 2;
        cookies->count -= half;
        cookies->base = (cookies->base + half) % ND_COOKIE_LIMIT;
        memmove(cookies->positions, cookies->positions + half,
                cookies->count * sizeof *cookies->positions);
        fill_slots(cookies);
        return 0;
    }
    uint32_t room = cookies->room ? 2 * cookies->room : FIRST_ROOM;
    uint64_t *positions = realloc(cookies->positions, room * sizeof *positions);
    if (!positions)
        return -ENOMEM;
    cookies->positions = positions;
    uint32_t *slots = realloc(cookies->slots, 2 * (size_t)room * sizeof *slots);
    if (!slots)
        return -ENOMEM;
    cookies->slots = slots;
    cookies->room = room;
    fill_slots(cookies);
    return 0;
}

static int cookie_of(nd_cookies *cookies, uint64_t position, uint64_t *cookie) {
    if (position < ND_COOKIE_LIMIT) {
        *cookie = position;
        return 0;
    }
    uint32_t *slot = cookies->room ? slot_of(cookies, position) : NULL;
    if (!slot || !*slot) {
        if (cookies->count == cookies->room || cookies->count == cookies->most) {
            int error = make_room(cookies);
            if (error)
                return error;
            slot = slot_of(cookies, position);
        }
        cookies->positions[cookies->count] = position;
        *slot = ++cookies->count;
    }
    *cookie = ND_COOKIE_LIMIT + (uint64_t)(cookies->base + *slot - 1) % ND_COOKIE_LIMIT;
    return 0;
}

/* The number of the first position, and at most `room` of them; returns how many there are. */
uint32_t nd_cookies_dump(nd_cookies *cookies, uint64_t *positions, uint32_t room, uint32_t *base) {
    pthread_mutex_lock(&cookies->lock);
    uint32_t count = cookies->count;
    *base = cookies->base;
    if (room && count)
        memcpy(positions, cookies->positions, (room < count ? room : count) * sizeof *positions);
    pthread_mutex_unlock(&cookies->lock);
    return count;
}

/* Give positions their numbers again; only to fresh cookies. */
int nd_cookies_load(nd_cookies *cookies, const uint64_t *positions, uint32_t count, uint32_t base) {
    uint64_t cookie;
    int error = 0;
    cookies->base = base;
    for (uint32_t i = 0; i < count && !error; i++)
        error = cookie_of(cookies, positions[i], &cookie);
    return error;
}

/* What the file system calls the position; -EINVAL if the cookie is not known (any more). */
int nd_position(nd_cookies *cookies, uint64_t cookie, uint64_t *position) {
    if (cookie < ND_COOKIE_LIMIT) {
        *position = cookie;
        return 0;
    }
    pthread_mutex_lock(&cookies->lock);
    uint32_t at = ((uint32_t)cookie - ND_COOKIE_LIMIT - cookies->base) % ND_COOKIE_LIMIT;
    bool known = cookie < 2 * (uint64_t)ND_COOKIE_LIMIT && at < cookies->count;
    if (known)
        *position = cookies->positions[at];
    pthread_mutex_unlock(&cookies->lock);
    return known ? 0 : -EINVAL;
}

/* Replace the positions in Rreaddir entries by their cookies. */
int nd_shorten(nd_cookies *cookies, uint8_t *entries, uint32_t size) {
    int error = 0;
    pthread_mutex_lock(&cookies->lock);
    for (uint32_t at = 0; at < size && !error;) {
        uint64_t number;
        uint16_t length;
        memcpy(&number, entries + at + COOKIE_AT, sizeof number);
        memcpy(&length, entries + at + ENTRY_FIXED - sizeof length, sizeof length);
        error = cookie_of(cookies, le64toh(number), &number);
        put64(entries + at + COOKIE_AT, number);
        at += ENTRY_FIXED + le16toh(length);
    }
    pthread_mutex_unlock(&cookies->lock);
    return error;
}

/* The whole entries behind the one with this cookie, at most `room` bytes of a run; 0 if it has
 * none that fit. */
uint32_t nd_entries_behind(const uint8_t *run, uint32_t size, uint64_t cookie, uint32_t room,
                           uint32_t *start) {
    bool found = false;
    for (uint32_t at = 0; at < size;) {
        uint64_t number;
        uint16_t length;
        memcpy(&number, run + at + COOKIE_AT, sizeof number);
        memcpy(&length, run + at + ENTRY_FIXED - sizeof length, sizeof length);
        uint32_t next = at + ENTRY_FIXED + le16toh(length);
        if (found && next - *start > room)
            return at - *start;
        if (!found && le64toh(number) == cookie) {
            found = true;
            *start = next;
        }
        at = next;
    }
    return found ? size - *start : 0;
}

struct dirent64_head { /* getdents64(2); glibc's struct dirent64 has a fixed-size name */
    uint64_t ino;
    int64_t off;
    uint16_t reclen;
    uint8_t type;
    char name[];
} __attribute__((packed));

/* Entries after position `offset` (0: the start) as the kernel gives them; bytes or -errno. */
int64_t nd_getdents(int fd, uint64_t offset, uint8_t *out, uint32_t size) {
    if (lseek(fd, (off_t)offset, SEEK_SET) < 0)
        return -errno;
    long got = syscall(SYS_getdents64, fd, out, size);
    return got < 0 ? -errno : got;
}

/* `names`: each ended by a NUL, the last by two. */
static bool is_among(const char *name, const char *names) {
    for (; *names; names += strlen(names) + 1)
        if (!strcmp(name, names))
            return true;
    return false;
}

struct listing {
    int fd, at_root, look_up, mapped;
    const char *covered;
    const nd_qid_table *table;
    uint64_t dev;
};

static bool must_look(const struct listing *listing, const struct dirent64_head *entry) {
    /* ".." of what is mounted is outside of it, and getdents does not say so. */
    return listing->look_up == ND_LOOK_ALL || entry->type == DT_UNKNOWN ||
           (listing->look_up == ND_LOOK_DIRECTORIES && entry->type == DT_DIR) ||
           !strcmp(entry->name, "..") || is_among(entry->name, listing->covered);
}

/* Device, inode, mode and version as a walk would find them; 0 if it would find nothing. In a
 * directory that may only be read there are no walks, and the entry has to do. */
static bool identify(const struct listing *listing, const struct dirent64_head *entry,
                     nd_stat *out) {
    *out = (nd_stat){.dev = listing->dev, .ino = entry->ino, .mode = DTTOIF(entry->type)};
    if (!*entry->name) /* a FUSE server's name may begin with a NUL; clients choke on it */
        return false;
    if (must_look(listing, entry)) {
        bool itself = listing->at_root && !strcmp(entry->name, "..");
        struct statx st;
        int error = stat_cached(listing->fd, itself ? "" : entry->name, &st);
        if (error)
            return error == -EACCES;
        fill_stat(out, &st);
    }
    if (listing->mapped && S_ISREG(out->mode))
        out->mode = nd_mode_at(listing->fd, entry->name, out->mode);
    return true;
}

/*
 * A run of Rreaddir entries after position `offset`, whole entries only, at most `size` bytes.
 * Returns the bytes written (0: the end), -EINVAL if not even one entry fits, -EDOM if the first
 * one has no number in the table. An entry that is looked up and has vanished is left out.
 * `at_root`: ".." is the directory itself, as it is for a walk. `mapped`: types of plain files are
 * those of _owners.c. Moves the position of `fd`, so one caller at a time.
 */
int64_t nd_readdir(int fd, uint64_t offset, int at_root, int look_up, const char *covered,
                   int mapped, const nd_qid_table *table, nd_cookies *cookies, uint8_t *out,
                   uint32_t size) {
    enum { CHUNK = 32768, LEAST = 512 };
    _Alignas(8) uint8_t chunk[CHUNK];
    struct listing listing = {fd, at_root, look_up, mapped, covered, table, 0};
    struct statx itself;
    uint32_t used = 0;
    int error = stat_cached(fd, "", &itself);
    if (error)
        return error;
    listing.dev = device_of(&itself);
    if (lseek(fd, (off_t)offset, SEEK_SET) < 0)
        return -errno;
    for (bool full = false; !full;) {
        /* An entry takes about as much here as there: reading much more than fits is wasted. */
        uint32_t want = size - used < CHUNK ? size - used : CHUNK;
        long got = syscall(SYS_getdents64, fd, chunk, want < LEAST ? LEAST : want);
        if (got < 0 && !used)
            return -errno;
        if (got <= 0)
            break;
        for (long at = 0; at < got && !full;) {
            const struct dirent64_head *entry = (const struct dirent64_head *)(chunk + at);
            size_t length = strlen(entry->name);
            uint64_t path;
            nd_stat st;
            at += entry->reclen;
            if (used + ENTRY_FIXED + length > size) {
                error = -EINVAL;
                full = true;
            } else if (identify(&listing, entry, &st)) {
                if (qid_path(st.dev, st.ino, table, &path)) {
                    error = -EDOM;
                    full = true;
                    continue;
                }
                uint8_t *to = put_qid(out + used, st.mode, st.version, path);
                to = put8(put64(to, (uint64_t)entry->off), (uint8_t)IFTODT(st.mode));
                memcpy(put16(to, (uint16_t)length), entry->name, length);
                used += ENTRY_FIXED + (uint32_t)length;
            }
        }
    }
    if (!used)
        return error;
    error = nd_shorten(cookies, out, used);
    return error ? error : (int64_t)used;
}
