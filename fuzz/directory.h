/*
 * A directory on a file system that says what it likes, as FUSE may: the system calls that read it,
 * answered by an input. The kernel has gone through the entries first (fs/readdir.c,
 * verify_dirent_name; fs/fuse/readdir.c): they are whole and their names have no slash, though
 * perhaps a NUL. Included before ninepd's sources.
 */

#ifndef FUZZ_DIRECTORY_H
#define FUZZ_DIRECTORY_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "harness.h"

enum { ENTRIES_MAX = 48, LONGEST_NAME = 4095, ENTRY_HEAD = 19 };

static struct directory {
    uint32_t count, at;
    bool hashed; /* positions look like hashes */
    struct entry {
        char name[LONGEST_NAME + 1];
        uint16_t length;
        struct record record;
    } entries[ENTRIES_MAX];
} directory;

static uint64_t position_of(uint32_t at) {
    uint64_t number = at + 1;
    return directory.hashed ? (directory.entries[at].record.d ^ number * 0x9e3779b97f4a7c15) >> 1
                            : number;
}

/* c is what statx says: its lowest byte an errno if below 40, then the mode's type and so on. */
static void add_entry(struct record record) {
    struct entry *entry = &directory.entries[directory.count++];
    entry->record = record;
    entry->length = record.a ? record.a : 1;
    if (record.op & 0x80)
        entry->length = 1 + record.b % LONGEST_NAME;
    for (uint16_t i = 0; i < entry->length; i++)
        entry->name[i] = (char)('a' + (record.b + i * 7) % 26);
    if (record.op & 0x40) { /* "." or "..", or a name that begins with its NUL */
        entry->length = record.b & 1 ? 2 : 1;
        memcpy(entry->name, record.b & 1 ? ".." : record.b & 2 ? "." : "", entry->length);
    }
    entry->name[entry->length] = '\0';
}

static const struct entry *entry_named(const char *name) {
    for (uint32_t i = 0; i < directory.count; i++)
        if (!strcmp(directory.entries[i].name, name))
            return &directory.entries[i];
    return NULL;
}

static off_t directory_seek(off_t to) {
    for (directory.at = 0; to && directory.at < directory.count; directory.at++)
        if (position_of(directory.at) == (uint64_t)to) {
            directory.at++;
            return to;
        }
    if (to < 0) {
        errno = EINVAL;
        return -1;
    }
    return to;
}

static long directory_read(uint8_t *out, uint32_t size) {
    uint32_t used = 0;
    for (; directory.at < directory.count; directory.at++) {
        const struct entry *entry = &directory.entries[directory.at];
        uint16_t whole = (uint16_t)((ENTRY_HEAD + entry->length + 1 + 7) & ~7);
        uint64_t position = position_of(directory.at);
        if (entry->record.op & 0x20 && !used) {
            errno = EIO;
            return -1;
        }
        if (used + whole > size)
            break;
        memset(out + used, 0, whole);
        memcpy(out + used, &entry->record.d, 8);
        memcpy(out + used + 8, &position, 8);
        memcpy(out + used + 16, &whole, 2);
        out[used + 18] = entry->record.op & 15;
        memcpy(out + used + ENTRY_HEAD, entry->name, entry->length);
        used += whole;
    }
    if (!used && directory.at < directory.count) {
        errno = EINVAL; /* the first one does not fit */
        return -1;
    }
    return used;
}

static long directory_call(long number, ...) {
    long result;
    __builtin_va_list arguments;
    __builtin_va_start(arguments, number);
    (void)__builtin_va_arg(arguments, int);
    if (number == SYS_getdents64) {
        uint8_t *out = __builtin_va_arg(arguments, uint8_t *);
        result = directory_read(out, __builtin_va_arg(arguments, uint32_t));
    } else {
        errno = ENOSYS;
        result = -1;
    }
    __builtin_va_end(arguments);
    return result;
}

/* What c says of an entry; of the directory itself there is always something to say. */
static int directory_stat(const char *name, struct statx *out) {
    const struct entry *entry = *name ? entry_named(name) : NULL;
    uint32_t told = entry ? entry->record.c : 0x4000;
    memset(out, 0, sizeof *out);
    if (*name && (!entry || (told & 0xff && (told & 0xff) < 40))) {
        errno = entry ? (int)(told & 0xff) : ENOENT;
        return -1;
    }
    out->stx_mask = told >> 16 & STATX_BTIME;
    out->stx_mode = (uint16_t)told;
    out->stx_ino = entry ? entry->record.d : 1;
    out->stx_dev_major = told >> 24;
    out->stx_size = entry ? entry->record.d : 0;
    out->stx_mtime.tv_sec = entry ? (int64_t)entry->record.d : 0;
    out->stx_mtime.tv_nsec = told;
    return 0;
}

static ssize_t directory_xattr(const char *path, uint8_t *out, size_t size) {
    const char *name = strrchr(path, '/');
    const struct entry *entry = entry_named(name ? name + 1 : path);
    uint32_t told = entry ? entry->record.c >> 8 : ENODATA;
    if (told % 3 == 0) {
        errno = told % 256 ? (int)(told % 256) : ERANGE;
        return -1;
    }
    size_t length = told % 3 == 1 ? size : told % 7;
    if (length > size) {
        errno = ERANGE;
        return -1;
    }
    memset(out, (int)told, length);
    return (ssize_t)length;
}

static int directory_handle(struct file_handle *handle) {
    const struct entry *entry = directory.count ? &directory.entries[0] : NULL;
    uint32_t length = entry ? entry->record.c % 160 : 160;
    if (length > handle->handle_bytes) {
        errno = EOPNOTSUPP;
        return -1;
    }
    handle->handle_bytes = length;
    handle->handle_type = entry ? entry->record.a : 0;
    memset(handle->f_handle, handle->handle_type, length);
    return 0;
}

#define syscall(...) directory_call(__VA_ARGS__)
#define lseek(fd, to, whence) directory_seek(to)
#define statx(fd, name, flags, mask, out) ((void)(flags), directory_stat(name, out))
#define getxattr(path, name, out, size) directory_xattr(path, (uint8_t *)(out), size)
#define lgetxattr(path, name, out, size) directory_xattr(path, (uint8_t *)(out), size)
#define name_to_handle_at(fd, name, handle, mount, flags) ((void)(mount), directory_handle(handle))

#endif
