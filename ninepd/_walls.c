/*
 * What a process shuts itself off with: mounts of its own, Landlock, and what may be asked of it.
 * sandbox.py puts them together. Thin, each call one step; all return -errno. glibc knows few of
 * these calls, and the headers of older releases not all constants: those are here, as in the UAPI.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef-begin */
int nd_unshare(int flags);
int nd_clone_tree(int dirfd, const char *path, bool recursive);
int nd_restrict_tree(int fd, uint64_t attributes, bool recursive);
int nd_follow_tree(int fd);
int nd_attach_tree(int fd, int dirfd, const char *name);
int nd_new_tmpfs(void);
int nd_follow_host(void);
int nd_change_root(int fd);
int nd_landlock_query(uint32_t flags);
int nd_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scope);
int nd_landlock_allow(int ruleset, int fd, uint64_t files);
int nd_landlock_enforce(int ruleset);
int nd_hide_memory(void);
int nd_never_execute(void);
/* cdef-end */

enum {
    ND_OPEN_TREE = 428, /* one number everywhere since 5.0 */
    ND_MOVE_MOUNT = 429,
    ND_FSOPEN = 430,
    ND_FSCONFIG = 431,
    ND_FSMOUNT = 432,
    ND_MOUNT_SETATTR = 442,
    ND_LANDLOCK_CREATE_RULESET = 444,
    ND_LANDLOCK_ADD_RULE = 445,
    ND_LANDLOCK_RESTRICT_SELF = 446,
    ND_CLONE_TREE = 1,      /* OPEN_TREE_CLONE */
    ND_MOVE_EMPTY_PATH = 4, /* MOVE_MOUNT_F_EMPTY_PATH */
    ND_RECURSIVE = 0x8000,  /* AT_RECURSIVE */
    ND_CLOEXEC = 1,         /* FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC */
    ND_SET_STRING = 1,      /* FSCONFIG_SET_STRING */
    ND_CREATE = 6,          /* FSCONFIG_CMD_CREATE */
    ND_BENEATH = 1,         /* LANDLOCK_RULE_PATH_BENEATH */
    ND_PR_SET_MDWE = 65,    /* Linux 6.3 */
    ND_PR_GET_MDWE = 66,
    ND_PR_MDWE_REFUSE_EXEC = 1, /* memory that could be written is never executed */
};

static int nd_result(long result) { return result < 0 ? -errno : (int)result; }

int nd_unshare(int flags) { return nd_result(unshare(flags)); }

/* A copy of a mount that is attached nowhere; with all that is mounted below if `recursive`. */
int nd_clone_tree(int dirfd, const char *path, bool recursive) {
    unsigned int flags = ND_CLONE_TREE | O_CLOEXEC | (*path ? 0 : AT_EMPTY_PATH);
    return nd_result(syscall(ND_OPEN_TREE, dirfd, path, flags | (recursive ? ND_RECURSIVE : 0)));
}

static int nd_set_attributes(int fd, uint64_t attributes, uint64_t propagation, bool recursive) {
    struct { /* struct mount_attr */
        uint64_t attr_set, attr_clr, propagation, userns_fd;
    } how = {attributes, 0, propagation, 0};
    int flags = AT_EMPTY_PATH | (recursive ? ND_RECURSIVE : 0);
    return nd_result(syscall(ND_MOUNT_SETATTR, fd, "", flags, &how, sizeof how));
}

/* `attributes` are those of mount_setattr(2), and none is taken away. */
int nd_restrict_tree(int fd, uint64_t attributes, bool recursive) {
    return nd_set_attributes(fd, attributes, 0, recursive);
}

/* What the host mounts and unmounts below happens here, too; not the other way round. */
int nd_follow_tree(int fd) { return nd_set_attributes(fd, 0, MS_SLAVE, true); }

int nd_attach_tree(int fd, int dirfd, const char *name) {
    return nd_result(syscall(ND_MOVE_MOUNT, fd, "", dirfd, name, ND_MOVE_EMPTY_PATH));
}

/* An empty file system of a few inodes, attached nowhere. */
int nd_new_tmpfs(void) {
    int context = (int)syscall(ND_FSOPEN, "tmpfs", ND_CLOEXEC), mount = -1;
    if (context < 0)
        return -errno;
    if (syscall(ND_FSCONFIG, context, ND_SET_STRING, "nr_inodes", "8", 0) == 0 &&
        syscall(ND_FSCONFIG, context, ND_SET_STRING, "mode", "0755", 0) == 0 &&
        syscall(ND_FSCONFIG, context, ND_CREATE, NULL, NULL, 0) == 0)
        mount = (int)syscall(ND_FSMOUNT, context, ND_CLOEXEC, 0);
    int error = mount < 0 ? -errno : mount;
    close(context);
    return error;
}

static int nd_set_slave(void) { return mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL); }

/* What is done here is not done on the host. Who has been given another root by chroot(2), which
 * need not be a mount, gets the namespace's own by entering it once more (setns(2)); and its
 * working directory is that, too. */
int nd_follow_host(void) {
    if (nd_set_slave() == 0)
        return 0;
    if (errno != EINVAL)
        return -errno;
    int own = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    if (own < 0)
        return -errno;
    int error = nd_result(setns(own, CLONE_NEWNS));
    close(own);
    return error ? error : nd_result(nd_set_slave());
}

/* The mount `fd` becomes the root, and of all the others none is left (pivot_root(2), "." twice).
 */
int nd_change_root(int fd) {
    int error = nd_attach_tree(fd, AT_FDCWD, "/");
    if (error)
        return error;
    if (fchdir(fd) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 ||
        chdir("/") < 0)
        return -errno;
    return 0;
}

/* The version of Landlock, or with a flag its errata (landlock_create_ruleset(2)). */
int nd_landlock_query(uint32_t flags) {
    return nd_result(syscall(ND_LANDLOCK_CREATE_RULESET, NULL, 0, flags));
}

int nd_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scope) {
    struct { /* struct landlock_ruleset_attr; an older kernel wants the rest to be zero */
        uint64_t files, network, scope;
    } what = {files, network, scope};
    return nd_result(syscall(ND_LANDLOCK_CREATE_RULESET, &what, sizeof what, 0));
}

int nd_landlock_allow(int ruleset, int fd, uint64_t files) {
    struct { /* struct landlock_path_beneath_attr */
        uint64_t files;
        int32_t fd;
    } __attribute__((packed)) what = {files, fd};
    return nd_result(syscall(ND_LANDLOCK_ADD_RULE, ruleset, ND_BENEATH, &what, 0));
}

int nd_landlock_enforce(int ruleset) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    return nd_result(syscall(ND_LANDLOCK_RESTRICT_SELF, ruleset, 0));
}

/* No other process of the same user may look into this one (ptrace(2)). */
int nd_hide_memory(void) { return nd_result(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)); }

int nd_never_execute(void) {
    int result = nd_result(prctl(ND_PR_SET_MDWE, ND_PR_MDWE_REFUSE_EXEC, 0, 0, 0));
    /* Whoever started us may have asked for it already, and for more. */
    if (result == -EPERM && prctl(ND_PR_GET_MDWE, 0, 0, 0, 0) & ND_PR_MDWE_REFUSE_EXEC)
        return 0;
    return result;
}
