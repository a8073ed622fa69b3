/*
 * System calls that Python's os module lacks, or that are hot: plain data in, plain data or -errno
 * out. No policy and no fids here. Every name is one component relative to a directory descriptor,
 * so openat2 with SCOPED can neither leave that directory nor follow a link (openat2(2)).
 *
 * The body of an Rgetattr is encoded for the wire because one call then serves one request. It
 * needs qid.path numbers; the table of devices that makes them belongs to Python (export/qid.py)
 * and is only read here.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

/* cdef-begin */
/* What export/ asks of a file; filled by statx, one layout with Stat in syscalls.py. `generation`
 * is 32 bits, and ND_OWN_GENERATION if it is the file system's own and not a guess. */
typedef struct {
    uint64_t dev, ino, mnt_id, generation;
    uint32_t mode, nlink, version, automount;
} nd_stat;

/* qid.path of an inode below 2^48 on `dev` is `prefix | ino`. */
typedef struct {
    uint64_t dev, prefix;
} nd_qid_device;

typedef struct {
    uint64_t count;
    nd_qid_device devices[];
} nd_qid_table;

typedef struct {
    uint64_t type, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen;
} nd_statfs;

#define ND_OWN_GENERATION 0x100000000
enum { ND_GETATTR_BODY = 153, ND_UNMAPPED = 1, ND_HANDLE_MAX = 132 };

int nd_walk(int dirfd, const char *name, nd_stat *out);
int nd_stat_at(int dirfd, const char *name, int identify, nd_stat *out);
int nd_open_scoped(int dirfd, const char *name, int flags);
int nd_open_parent(int dirfd);
int nd_getattr(int fd, const nd_qid_table *table, uint64_t generation, uint8_t *body);
int nd_getattr_as(int fd, uint64_t path, uint64_t generation, uint8_t *body);
int nd_create(int dirfd, const char *name, int flags, uint32_t mode, uint32_t uid, uint32_t gid);
int nd_mkdir(int dirfd, const char *name, uint32_t mode, uint32_t uid, uint32_t gid);
int nd_symlink(const char *target, int dirfd, const char *name, uint32_t uid, uint32_t gid);
int nd_mknod(int dirfd, const char *name, uint32_t mode, uint32_t major, uint32_t minor,
             uint32_t uid, uint32_t gid);
int nd_chown(int fd, uint32_t uid, uint32_t gid);
int nd_utimens(int fd, int64_t atime_sec, int64_t atime_nsec, int64_t mtime_sec,
               int64_t mtime_nsec);
int nd_fstatfs(int fd, nd_statfs *out);
int nd_write_out(int fd, int64_t offset, int64_t count);
int nd_file_handle(int fd, uint8_t *out);
int nd_open_by_handle(int mount_fd, const uint8_t *handle, int size, int flags);
int64_t nd_getxattr(int fd, const char *name, uint8_t *out, uint32_t size);
/* cdef-end */

#define SCOPED (RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
#define STATX_WANTED (STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID)
#define QID_INO_LIMIT (UINT64_C(1) << 48)
#define NO_ID UINT32_MAX

static int scoped_open(int dirfd, const char *name, uint64_t flags, uint64_t mode) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .mode = mode, .resolve = SCOPED};
    for (int attempt = 0;; attempt++) {
        long fd = syscall(SYS_openat2, dirfd, name, &how, sizeof how);
        if (fd >= 0)
            return (int)fd;
        /* EAGAIN: a rename on the host raced with the scoped look-up; try again (openat2(2)). */
        if (errno != EAGAIN || attempt == 64)
            return -errno;
    }
}

/* Changes whenever content or attributes do; never 0, which turns all caching off in the Linux
 * client (fs/9p/vfs_file.c, v9fs_file_open). */
static uint32_t qid_version(const struct statx *st) {
    uint64_t h = (uint64_t)st->stx_mtime.tv_sec * UINT64_C(0x9e3779b97f4a7c15);
    h = (h ^ st->stx_mtime.tv_nsec) * UINT64_C(0xbf58476d1ce4e5b9);
    h = (h ^ (uint64_t)st->stx_ctime.tv_sec ^ (h >> 29)) * UINT64_C(0x94d049bb133111eb);
    h = (h ^ st->stx_ctime.tv_nsec ^ st->stx_size ^ (h >> 32)) * UINT64_C(0x9e3779b97f4a7c15);
    uint32_t version = (uint32_t)(h >> 32);
    return version ? version : 1;
}

/* The kernel's own name for an inode: its type as 4 bytes, then up to 128 bytes that hold the
 * generation too. Returns the length, or -EOPNOTSUPP where a file system has none. */
int nd_file_handle(int fd, uint8_t *out) {
    union {
        struct file_handle handle;
        uint8_t room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
    } h = {.handle.handle_bytes = MAX_HANDLE_SZ};
    int mount_id, type;
    if (name_to_handle_at(fd, "", &h.handle, &mount_id, AT_EMPTY_PATH) < 0)
        return -errno;
    type = h.handle.handle_type;
    memcpy(out, &type, sizeof type);
    memcpy(out + sizeof type, h.handle.f_handle, h.handle.handle_bytes);
    return (int)(sizeof type + h.handle.handle_bytes);
}

/* Open what a handle names; `mount_fd` is an ordinary descriptor on its mount. */
int nd_open_by_handle(int mount_fd, const uint8_t *handle, int size, int flags) {
    union {
        struct file_handle handle;
        uint8_t room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
    } h = {.handle.handle_bytes = (unsigned int)size - sizeof(int)};
    if (size < (int)sizeof(int) || size > ND_HANDLE_MAX)
        return -EINVAL;
    memcpy(&h.handle.handle_type, handle, sizeof(int));
    memcpy(h.handle.f_handle, handle + sizeof(int), h.handle.handle_bytes);
    int fd = open_by_handle_at(mount_fd, &h.handle, flags | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* Tells a recycled inode from its predecessor. 32 bits, because Linux compares it with i_generation
 * (fs/9p/vfs_inode_dotl.c). From the file handle if there is one, which holds the generation: as
 * it is on ext4 (FILEID_INO32_GEN), else mixed so that a change of one word always changes the
 * result. Otherwise from the birth time, which is only a good guess. */
static uint64_t generation_of(int fd, const struct statx *st) {
    uint8_t handle[ND_HANDLE_MAX];
    int size = nd_file_handle(fd, handle);
    uint32_t h = 0, word;
    if (size < 0) {
        uint64_t birth = (uint64_t)st->stx_btime.tv_sec * UINT64_C(0x9e3779b97f4a7c15);
        birth = (birth ^ st->stx_btime.tv_nsec ^ (birth >> 31)) * UINT64_C(0xbf58476d1ce4e5b9);
        return st->stx_mask & STATX_BTIME ? birth >> 32 : 0;
    }
    int type;
    memcpy(&type, handle, sizeof type);
    if (type == 1 && size == 12) {
        memcpy(&h, handle + 8, sizeof h);
        return ND_OWN_GENERATION | h;
    }
    for (int at = 0; at < size; at += (int)sizeof word) {
        word = 0;
        memcpy(&word, handle + at, size - at < (int)sizeof word ? size - at : (int)sizeof word);
        h = h * UINT32_C(0x9e3779b1) + word;
    }
    return ND_OWN_GENERATION | h;
}

static uint64_t device_of(const struct statx *st) {
    return makedev(st->stx_dev_major, st->stx_dev_minor);
}

static int stat_with(int fd, const char *name, int sync, struct statx *st) {
    int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | sync;
    if (!*name)
        flags |= AT_EMPTY_PATH;
    return statx(fd, name, flags, STATX_WANTED, st) < 0 ? -errno : 0;
}

static int stat_fd(int fd, const char *name, struct statx *st) {
    return stat_with(fd, name, AT_STATX_SYNC_AS_STAT, st);
}

static int stat_cached(int fd, const char *name, struct statx *st) {
    return stat_with(fd, name, AT_STATX_DONT_SYNC, st);
}

static void fill_stat(nd_stat *out, const struct statx *st) {
    *out = (nd_stat){
        .dev = device_of(st),
        .ino = st->stx_ino,
        .mnt_id = st->stx_mnt_id,
        .mode = st->stx_mode,
        .nlink = st->stx_nlink,
        .version = qid_version(st),
        .automount = !!(st->stx_attributes & STATX_ATTR_AUTOMOUNT),
    };
}

/* Look one name up without opening it: an O_PATH descriptor and its attributes. */
int nd_walk(int dirfd, const char *name, nd_stat *out) {
    int fd = scoped_open(dirfd, name, O_PATH | O_NOFOLLOW, 0);
    if (fd < 0)
        return fd;
    struct statx st;
    /* What the look-up brought is fresh; asking again could wait for another file system's server.
     */
    int error = stat_cached(fd, "", &st);
    if (error) {
        close(fd);
        return error;
    }
    fill_stat(out, &st);
    out->generation = generation_of(fd, &st);
    return fd;
}

/* Attributes of a name in a directory, or of the descriptor itself when `name` is empty; then
 * `identify` asks for the generation too. */
int nd_stat_at(int dirfd, const char *name, int identify, nd_stat *out) {
    struct statx st;
    int error = *name ? stat_cached(dirfd, name, &st) : stat_fd(dirfd, "", &st);
    if (error)
        return error;
    fill_stat(out, &st);
    if (identify)
        out->generation = generation_of(dirfd, &st);
    return 0;
}

int nd_open_scoped(int dirfd, const char *name, int flags) {
    return scoped_open(dirfd, name, (uint64_t)(unsigned int)flags, 0);
}

/* ".." cannot be scoped (EXDEV); the caller proves that the result lies under the export. */
int nd_open_parent(int dirfd) {
    int fd = openat(dirfd, "..", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static uint8_t *put8(uint8_t *at, uint8_t value) {
    *at = value;
    return at + 1;
}

static uint8_t *put16(uint8_t *at, uint16_t value) {
    value = htole16(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static uint8_t *put32(uint8_t *at, uint32_t value) {
    value = htole32(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static uint8_t *put64(uint8_t *at, uint64_t value) {
    value = htole64(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static int qid_path(uint64_t dev, uint64_t ino, const nd_qid_table *table, uint64_t *path) {
    if (ino < QID_INO_LIMIT)
        for (uint64_t i = 0; i < table->count; i++)
            if (table->devices[i].dev == dev) {
                *path = table->devices[i].prefix | ino;
                return 0;
            }
    return ND_UNMAPPED;
}

static uint8_t qid_type(uint32_t mode) { return S_ISDIR(mode) ? 0x80 : S_ISLNK(mode) ? 0x02 : 0; }

static uint8_t *put_qid(uint8_t *at, uint32_t mode, uint32_t version, uint64_t path) {
    return put64(put32(put8(at, qid_type(mode)), version), path);
}

/* As Linux's new_encode_dev(). */
static uint64_t wire_device(uint32_t major_number, uint32_t minor_number) {
    return (uint64_t)(minor_number & 0xff) | (uint64_t)major_number << 8 |
           (uint64_t)(minor_number & ~0xffU) << 12;
}

static uint8_t *put_time(uint8_t *at, struct statx_timestamp time) {
    return put64(put64(at, (uint64_t)time.tv_sec), time.tv_nsec);
}

/* The generation is sent in any case, because Linux compares it without looking at the valid bit.
 */
static void put_attributes(uint8_t *at, const struct statx *st, uint64_t path,
                           uint64_t generation) {
    const uint64_t basic = 0x7ff, btime = 0x800, gen = 0x1000;
    uint64_t rdev = wire_device(st->stx_rdev_major, st->stx_rdev_minor);
    at = put64(at, basic | (st->stx_mask & STATX_BTIME ? btime : 0) |
                       (generation & ND_OWN_GENERATION ? gen : 0));
    at = put_qid(at, st->stx_mode, qid_version(st), path);
    at = put32(put32(put32(at, st->stx_mode), st->stx_uid), st->stx_gid);
    at = put64(put64(put64(at, st->stx_nlink), rdev), st->stx_size);
    at = put64(put64(at, st->stx_blksize), st->stx_blocks);
    at = put_time(put_time(put_time(at, st->stx_atime), st->stx_mtime), st->stx_ctime);
    at = put_time(at, st->stx_btime);
    put64(put64(at, (uint32_t)generation), 0);
}

/* The body of an Rgetattr (ND_GETATTR_BODY bytes) of what `fd` holds. ND_UNMAPPED when the table
 * has no path number for it. The generation never changes, so the caller keeps it. */
int nd_getattr(int fd, const nd_qid_table *table, uint64_t generation, uint8_t *body) {
    struct statx st;
    uint64_t path;
    int error = stat_fd(fd, "", &st);
    if (!error)
        error = qid_path(device_of(&st), st.stx_ino, table, &path);
    if (!error)
        put_attributes(body, &st, path, generation);
    return error;
}

/* The same with a path number that the caller knows. */
int nd_getattr_as(int fd, uint64_t path, uint64_t generation, uint8_t *body) {
    struct statx st;
    int error = stat_fd(fd, "", &st);
    if (!error)
        put_attributes(body, &st, path, generation);
    return error;
}

/*
 * Creation runs under the guest user's identity, so an object never exists with a wrong owner.
 * Raw system calls, because credentials are per thread and glibc's wrappers change all of them.
 * NO_ID leaves an id as it is. Returns 0 or -EPERM; what cannot be undone ends the process.
 */
struct identity {
    uint32_t uid, gid;
    bool changed;
};

static uint32_t set_fs_id(long number, uint32_t id) {
    return (uint32_t)syscall(number, id); /* returns the previous one, whether it worked or not */
}

static void restore(struct identity old) {
    if (!old.changed)
        return;
    set_fs_id(SYS_setfsuid, old.uid);
    set_fs_id(SYS_setfsgid, old.gid);
    if (set_fs_id(SYS_setfsuid, NO_ID) != old.uid || set_fs_id(SYS_setfsgid, NO_ID) != old.gid)
        abort();
}

static int assume(uint32_t uid, uint32_t gid, struct identity *old) {
    old->gid = set_fs_id(SYS_setfsgid, gid);
    old->uid = set_fs_id(SYS_setfsuid, uid);
    old->changed = (uid != NO_ID && uid != old->uid) || (gid != NO_ID && gid != old->gid);
    if (!old->changed)
        return 0;
    if ((uid != NO_ID && set_fs_id(SYS_setfsuid, NO_ID) != uid) ||
        (gid != NO_ID && set_fs_id(SYS_setfsgid, NO_ID) != gid)) {
        restore(*old);
        return -EPERM;
    }
    return 0;
}

#define AS(uid, gid, call)                                                                         \
    struct identity old_;                                                                          \
    int result_ = assume(uid, gid, &old_);                                                         \
    if (result_ == 0) {                                                                            \
        result_ = (call);                                                                          \
        if (result_ == -1)                                                                         \
            result_ = -errno;                                                                      \
        restore(old_);                                                                             \
    }                                                                                              \
    return result_

/* Create a regular file that must not exist yet; an open descriptor or -errno. */
int nd_create(int dirfd, const char *name, int flags, uint32_t mode, uint32_t uid, uint32_t gid) {
    uint64_t how = (uint64_t)(unsigned int)flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_NOCTTY;
    struct identity old;
    int result = assume(uid, gid, &old);
    if (result == 0) {
        result = scoped_open(dirfd, name, how, mode);
        restore(old);
    }
    return result;
}

int nd_mkdir(int dirfd, const char *name, uint32_t mode, uint32_t uid, uint32_t gid) {
    AS(uid, gid, mkdirat(dirfd, name, mode));
}

int nd_symlink(const char *target, int dirfd, const char *name, uint32_t uid, uint32_t gid) {
    AS(uid, gid, symlinkat(target, dirfd, name));
}

int nd_mknod(int dirfd, const char *name, uint32_t mode, uint32_t major_number,
             uint32_t minor_number, uint32_t uid, uint32_t gid) {
    AS(uid, gid, mknodat(dirfd, name, mode, makedev(major_number, minor_number)));
}

int nd_chown(int fd, uint32_t uid, uint32_t gid) {
    return fchownat(fd, "", uid, gid, AT_EMPTY_PATH) < 0 ? -errno : 0;
}

/* Times in seconds and nanoseconds; a nanosecond field may be UTIME_NOW or UTIME_OMIT. */
int nd_utimens(int fd, int64_t atime_sec, int64_t atime_nsec, int64_t mtime_sec,
               int64_t mtime_nsec) {
    struct timespec times[2] = {{atime_sec, atime_nsec}, {mtime_sec, mtime_nsec}};
    return syscall(SYS_utimensat, fd, "", times, AT_EMPTY_PATH) < 0 ? -errno : 0;
}

int nd_fstatfs(int fd, nd_statfs *out) {
    struct statfs st;
    if (fstatfs(fd, &st) < 0)
        return -errno;
    uint64_t fsid = 0;
    memcpy(&fsid, &st.f_fsid, sizeof st.f_fsid < sizeof fsid ? sizeof st.f_fsid : sizeof fsid);
    *out = (nd_statfs){
        .type = (uint64_t)st.f_type,
        .bsize = (uint64_t)st.f_bsize,
        .blocks = st.f_blocks,
        .bfree = st.f_bfree,
        .bavail = st.f_bavail,
        .files = st.f_files,
        .ffree = st.f_ffree,
        .fsid = fsid,
        .namelen = (uint64_t)st.f_namelen,
    };
    return 0;
}

/* Starts writing a range to the disk, after what of it is being written already: so QEMU does it
 * (hw/9pfs/9p-local.c, local_pwritev). The error of an earlier write is told here or never: the
 * kernel takes it for reported (mm/filemap.c, file_fdatawait_range). */
int nd_write_out(int fd, int64_t offset, int64_t count) {
    const unsigned how = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE;
    return sync_file_range(fd, offset, count, how) < 0 ? -errno : 0;
}

/* The value of an extended attribute of what `fd` holds; its length, or -errno. */
int64_t nd_getxattr(int fd, const char *name, uint8_t *out, uint32_t size) {
    char path[32]; /* fgetxattr(2) refuses O_PATH descriptors */
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t got = getxattr(path, name, out, size);
    return got < 0 ? -errno : got;
}
