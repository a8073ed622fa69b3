/*
 * Owners and modes as guests have set them, where on the host all files are the daemon's own: the
 * extended attributes in which QEMU keeps them (security_model=mapped-xattr), and how they take the
 * place of the host's.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

/* cdef-begin */
/* Each field is all ones if nothing was set; one layout with Owner in owners.py. `mode` holds the
 * type of the file, and `rdev` is makedev(3)'s. */
typedef struct {
    uint32_t uid, gid, mode, none;
    uint64_t rdev;
} nd_owner;

int nd_owner_of(int fd, nd_owner *out);
uint32_t nd_mode_at(int dirfd, const char *name, uint32_t host);
uint32_t nd_shown_mode(uint32_t host, uint32_t set);
void nd_put_owner(uint8_t *body, uint32_t uid, uint32_t gid, uint32_t mode, uint64_t rdev);
/* cdef-end */

/* What a guest sees: permissions that were set, and a type for what is a plain file on the host.
 * No file becomes a directory, or ceases to be one, whatever its attributes say. */
uint32_t nd_shown_mode(uint32_t host, uint32_t set) {
    uint32_t kind = host & S_IFMT, other = set & S_IFMT;
    if (set == UINT32_MAX)
        return host;
    if (kind == S_IFREG && other && other != S_IFDIR)
        kind = other;
    return kind | (set & ~(uint32_t)S_IFMT & 07777);
}

/* `path` leads to the file by a magic link, or through one to its directory; then it must not be
 * followed at its end. */
static int get_number(const char *path, bool follow, const char *name, void *value, size_t size) {
    ssize_t got = follow ? getxattr(path, name, value, size) : lgetxattr(path, name, value, size);
    if (got == (ssize_t)size)
        return 0;
    memset(value, 0xff, size);
    /* Of another size, absent, impossible, or hidden from the daemon: not set. */
    bool none = got >= 0 || errno == ERANGE || errno == ENODATA || errno == EOPNOTSUPP ||
                errno == EACCES || errno == EPERM;
    return none ? 0 : -errno;
}

/* What was set for the file that `fd` holds, which may be an O_PATH descriptor. */
int nd_owner_of(int fd, nd_owner *out) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int error = get_number(path, true, "user.virtfs.uid", &out->uid, sizeof out->uid);
    if (!error)
        error = get_number(path, true, "user.virtfs.gid", &out->gid, sizeof out->gid);
    if (!error)
        error = get_number(path, true, "user.virtfs.mode", &out->mode, sizeof out->mode);
    out->uid = le32toh(out->uid);
    out->gid = le32toh(out->gid);
    out->mode = le32toh(out->mode);
    out->rdev = UINT64_MAX;
    if (!error && out->mode != UINT32_MAX)
        error = get_number(path, true, "user.virtfs.rdev", &out->rdev, sizeof out->rdev);
    out->rdev = le64toh(out->rdev);
    return error;
}

/* The mode that is shown of a name in a directory, or of `dirfd` itself if `name` is empty; `host`
 * is the host's. */
uint32_t nd_mode_at(int dirfd, const char *name, uint32_t host) {
    char path[32 + NAME_MAX + 1];
    uint32_t mode;
    if (!S_ISREG(host) && !S_ISDIR(host))
        return host; /* has no such attributes (xattr(7)) */
    int length = snprintf(path, sizeof path, "/proc/self/fd/%d%s%s", dirfd, *name ? "/" : "", name);
    if (length >= (int)sizeof path ||
        get_number(path, !*name, "user.virtfs.mode", &mode, sizeof mode))
        return host;
    return nd_shown_mode(host, le32toh(mode));
}

/* Where they are in the body of an Rgetattr, which put_attributes() writes. */
enum {
    ND_BODY_TYPE = 8,
    ND_BODY_MODE = 21,
    ND_BODY_UID = 25,
    ND_BODY_GID = 29,
    ND_BODY_RDEV = 41,
};

/* Put it into the body of an Rgetattr that shows the host's. */
void nd_put_owner(uint8_t *body, uint32_t uid, uint32_t gid, uint32_t mode, uint64_t rdev) {
    uint32_t host;
    memcpy(&host, body + ND_BODY_MODE, sizeof host);
    mode = nd_shown_mode(le32toh(host), mode);
    put8(body + ND_BODY_TYPE, qid_type(mode));
    put32(body + ND_BODY_MODE, mode);
    if (uid != UINT32_MAX)
        put32(body + ND_BODY_UID, uid);
    if (gid != UINT32_MAX)
        put32(body + ND_BODY_GID, gid);
    if (rdev != UINT64_MAX)
        put64(body + ND_BODY_RDEV, wire_device(major(rdev), minor(rdev)));
}
