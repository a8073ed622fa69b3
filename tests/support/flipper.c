/*
 * A host user who may write in an export, and swaps what is there with links to what is outside, as
 * fast as it goes. What a guest takes away or puts in the way is made anew.
 *
 * Usage: flipper EXPORT OUTSIDE. Prints "ready", and when it is told to end (SIGTERM) how many
 * swaps there were.
 *
 * In EXPORT: d, a directory <-> l, a link to OUTSIDE; f <-> fl, a link to OUTSIDE/f; the same of
 * QEMU's metadata, .virtfs_metadata <-> .m and in it f <-> .f, .virtfs_metadata_root <-> .mr; and
 * the directory deep in x, y and OUTSIDE/pit by turns.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum kind { MISSING, LINK, REAL };
enum { HEAL_EVERY = 64 };

struct pair {
    const char *a, *b, *target;
    int is_directory, parent;
};

static volatile sig_atomic_t told_to_end;
static char outside[PATH_MAX], outside_f[PATH_MAX + 2], pit[PATH_MAX + 9];
static int root;
static unsigned long swaps;

static void end(int number) {
    (void)number;
    told_to_end = 1;
}

static enum kind kind_of(int at, const char *name) {
    struct stat found;
    if (fstatat(at, name, &found, AT_SYMLINK_NOFOLLOW))
        return MISSING;
    return S_ISLNK(found.st_mode) ? LINK : REAL;
}

static void make_file(int at, const char *name) {
    int fd = openat(at, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW, 0600);
    if (fd >= 0) {
        if (write(fd, "inside\n", 7) != 7)
            perror("write");
        close(fd);
    }
}

/* A directory as guests expect it; "keep" is never touched, so that nobody can remove it. */
static void make_directory(int at, const char *name) {
    mkdirat(at, name, 0700);
    int fd = openat(at, name, O_DIRECTORY | O_NOFOLLOW);
    if (fd < 0)
        return;
    make_file(fd, "keep");
    make_file(fd, "f");
    mkdirat(fd, "sub", 0700);
    int sub = openat(fd, "sub", O_DIRECTORY | O_NOFOLLOW);
    if (sub >= 0) {
        make_file(sub, "keep");
        make_file(sub, "f");
        close(sub);
    }
    close(fd);
}

static void make_real(const struct pair *p, const char *name) {
    if (kind_of(p->parent, name) != MISSING)
        unlinkat(p->parent, name, 0);
    if (p->is_directory) {
        if (renameat2(root, "gone", p->parent, name, RENAME_NOREPLACE))
            make_directory(p->parent, name);
    } else {
        make_file(p->parent, name);
    }
}

/* One of the two is a link to outside, and the other one is real. */
static void heal(const struct pair *p) {
    if (kind_of(p->parent, p->a) != REAL && kind_of(p->parent, p->b) != REAL)
        make_real(p, p->a);
    if (kind_of(p->parent, p->a) == LINK || kind_of(p->parent, p->b) == LINK)
        return;
    const char *name = kind_of(p->parent, p->a) == MISSING ? p->a : p->b;
    if (kind_of(p->parent, name) == REAL && unlinkat(p->parent, name, 0))
        renameat(p->parent, name, root, "gone");
    if (symlinkat(p->target, p->parent, name) && errno != EEXIST && errno != ENOENT)
        perror("symlink"); /* the last: a guest has removed the parent */
}

static void swap(const struct pair *p) {
    if (renameat2(p->parent, p->a, p->parent, p->b, RENAME_EXCHANGE))
        heal(p);
    else
        swaps++;
}

/* Guests may remove it where it means nothing to them. */
static void reopen_removed(struct pair *p, const char *parent) {
    struct stat found;
    if (fstat(p->parent, &found) || found.st_nlink)
        return;
    mkdirat(root, parent, 0700);
    int fd = openat(root, parent, O_DIRECTORY | O_NOFOLLOW);
    if (fd >= 0) {
        close(p->parent);
        p->parent = fd;
    }
}

static void move(const char *from, const char *to) {
    if (renameat(root, from, root, to)) {
        mkdirat(root, "x", 0700);
        mkdirat(root, "y", 0700);
    } else {
        swaps++;
    }
}

int main(int argc, char **argv) {
    if (argc != 3 || !realpath(argv[2], outside)) {
        fprintf(stderr, "usage: flipper EXPORT OUTSIDE\n");
        return 2;
    }
    snprintf(outside_f, sizeof outside_f, "%s/f", outside);
    snprintf(pit, sizeof pit, "%s/pit/deep", outside);
    root = open(argv[1], O_DIRECTORY);
    if (root < 0) {
        perror(argv[1]);
        return 1;
    }
    signal(SIGTERM, end);
    mkdirat(root, "x", 0700);
    mkdirat(root, "y", 0700);
    make_directory(root, "x/deep");
    mkdirat(root, ".virtfs_metadata", 0700);
    int meta = openat(root, ".virtfs_metadata", O_DIRECTORY | O_NOFOLLOW);
    struct pair pairs[] = {
        {"d", "l", outside, 1, root},
        {"f", "fl", outside_f, 0, root},
        {".virtfs_metadata_root", ".mr", outside_f, 0, root},
        {".virtfs_metadata", ".m", outside, 1, root},
        {"f", ".f", outside_f, 0, meta},
    };
    size_t count = sizeof pairs / sizeof *pairs;
    for (size_t i = 0; i < count; i++)
        heal(&pairs[i]);
    puts("ready");
    fflush(stdout);
    for (unsigned turn = 0; !told_to_end; turn++) {
        for (size_t i = 0; i < count; i++) {
            swap(&pairs[i]);
            if (turn % HEAL_EVERY == 0)
                heal(&pairs[i]);
        }
        if (turn % HEAL_EVERY == 0)
            reopen_removed(&pairs[count - 1], ".virtfs_metadata");
        move("x/deep", "y/deep");
        move("y/deep", pit);
        move(pit, "x/deep");
    }
    if (kind_of(AT_FDCWD, pit) == REAL)
        move(pit, "x/deep");
    printf("%lu\n", swaps);
    return 0;
}
