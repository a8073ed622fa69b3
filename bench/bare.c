/*
 * The limit: what the workloads of ringdriver.c cost when one process makes the system calls
 * itself. Reads and writes use memory, page by page, as a guest's lanes do. `ping-pong` is the
 * price of waking: two processes, two eventfds, a round trip, between two CPUs (as a busy guest and
 * its server are) or, `ping-pong-one`, on one.
 *
 * Usage: bare WORKLOAD FOLDER LANES MILLISECONDS. Prints one JSON object.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

enum { LANES = 65, SEGMENTS = 127, MSIZE = 512 * KIB };

static int root, target, data_file, directory, large_directory;
static struct iovec pages[LANES][SEGMENTS];
static unsigned lanes;
static uint64_t turn;

static void identify(int fd) {
    struct statx stat;
    check(statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &stat), "statx");
}

static int look_up(int dir, const char *name) {
    struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
    int fd = (int)check(syscall(SYS_openat2, dir, name, &how, sizeof how), name);
    identify(fd);
    return fd;
}

static void getattr(void) { identify(target); }

static void walk1(void) { close(look_up(root, "small")); }

static void walk5(void) {
    static const char *const names[] = {"a", "b", "c", "d", "e"};
    int at = root;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int next = look_up(at, names[i]);
        if (at != root)
            close(at);
        at = next;
    }
    close(at);
}

static void open_read(void) {
    char path[32], data[4 * KIB];
    int handle = look_up(root, "small");
    snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
    int fd = (int)check(open(path, O_RDONLY | O_CLOEXEC), path);
    check(pread(fd, data, sizeof data, 0), "pread");
    close(fd);
    close(handle);
}

static void move(size_t size, int write) {
    unsigned lane = (unsigned)(turn % lanes);
    uint64_t offset = (turn / lanes * LANES + lane) * size % (FILE_SPAN - MSIZE);
    offset &= ~(uint64_t)(PAGE - 1);
    int count = (int)(size / PAGE);
    ssize_t done = write ? pwritev2(data_file, pages[lane], count, (off_t)offset, 0)
                         : preadv2(data_file, pages[lane], count, (off_t)offset, 0);
    if (done != (ssize_t)size)
        die("%zd bytes instead of %zu", done, size);
    turn++;
}

static void read_4k(void) { move(4 * KIB, 0); }
static void read_64k(void) { move(64 * KIB, 0); }
static void read_508k(void) { move(508 * KIB, 0); }
static void write_4k(void) { move(4 * KIB, 1); }
static void write_64k(void) { move(64 * KIB, 1); }
static void write_508k(void) { move(508 * KIB, 1); }

static void read_directory(int directory) {
    static char entries[32 * KIB];
    struct statx stat;
    check(lseek(directory, 0, SEEK_SET), "lseek");
    for (long size; (size = check(getdents64(directory, entries, sizeof entries), "getdents64"));)
        for (long at = 0; at < size;) {
            const struct dirent64 *entry = (const struct dirent64 *)(entries + at);
            check(statx(directory, entry->d_name, AT_SYMLINK_NOFOLLOW,
                        STATX_BASIC_STATS | STATX_BTIME, &stat),
                  entry->d_name);
            at += entry->d_reclen;
        }
}

/* Names, types and numbers, as an Rreaddir has them: without a look at each file. */
static void readdir_all(void) {
    static char entries[32 * KIB];
    check(lseek(directory, 0, SEEK_SET), "lseek");
    while (check(getdents64(directory, entries, sizeof entries), "getdents64"))
        ;
}

static void list(void) { read_directory(large_directory); }

static void create_unlink(void) {
    int handle = (int)check(dup(root), "dup");
    int fd = (int)check(openat(root, "bare", O_CREAT | O_RDWR | O_EXCL | O_CLOEXEC, 0644), "bare");
    identify(fd);
    close(fd);
    close(handle);
    check(unlinkat(root, "bare", 0), "unlinkat");
}

static int there, back;

/* Binds the caller to the `number`th CPU that it may use, if there are so many. */
static void bind_to_cpu(int number) {
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    check(sched_getaffinity(0, sizeof allowed, &allowed), "sched_getaffinity");
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && number-- == 0) {
            CPU_SET(cpu, &one);
            check(sched_setaffinity(0, sizeof one, &one), "sched_setaffinity");
        }
}

static void ping(void) {
    eventfd_t count;
    check(eventfd_write(there, 1), "eventfd_write");
    check(eventfd_read(back, &count), "eventfd_read");
}

/* Answers until 2 comes at once. */
static void pong(void) {
    for (eventfd_t count;;) {
        check(eventfd_read(there, &count), "eventfd_read");
        if (count > 1)
            _exit(0);
        check(eventfd_write(back, 1), "eventfd_write");
    }
}

static void ping_one(void) { ping(); }

static const struct {
    const char *name;
    void (*once)(void);
} workloads[] = {
    {"getattr", getattr},     {"walk1", walk1},
    {"walk5", walk5},         {"open-read", open_read},
    {"read-4k", read_4k},     {"read-64k", read_64k},
    {"read-508k", read_508k}, {"write-4k", write_4k},
    {"write-64k", write_64k}, {"write-508k", write_508k},
    {"readdir", readdir_all}, {"create-unlink", create_unlink},
    {"ping-pong", ping},      {"ping-pong-one", ping_one},
    {"list", list},
};

static void prepare(const char *folder) {
    int fd;
    root = (int)check(open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC), folder);
    target = (int)check(openat(root, "small", O_PATH | O_CLOEXEC), "small");
    data_file = (int)check(openat(root, "file", O_RDWR | O_CLOEXEC), "file");
    directory = (int)check(openat(root, "dir1000", O_RDONLY | O_DIRECTORY | O_CLOEXEC), "dir1000");
    large_directory = openat(root, "many", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* if it is there */
    uint8_t *memory = shared_pages((size_t)lanes * MSIZE, &fd);
    for (unsigned lane = 0; lane < lanes; lane++)
        for (unsigned i = 0; i < SEGMENTS; i++)
            pages[lane][i] = (struct iovec){memory + (size_t)lane * MSIZE + i * PAGE, PAGE};
}

int main(int argc, char **argv) {
    if (argc != 5)
        die("usage: bare WORKLOAD FOLDER LANES MILLISECONDS");
    void (*once)(void) = NULL;
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++)
        if (!strcmp(workloads[i].name, argv[1]))
            once = workloads[i].once;
    lanes = (unsigned)atoi(argv[3]);
    uint64_t length = (uint64_t)atoll(argv[4]) * 1000000, operations = 0, now;
    if (!once || !lanes || lanes > LANES)
        die("%s: no such workload, or too many lanes", argv[1]);
    pid_t child = 0;
    if (once == ping || once == ping_one) {
        there = (int)check(eventfd(0, EFD_CLOEXEC), "eventfd");
        back = (int)check(eventfd(0, EFD_CLOEXEC), "eventfd");
        child = (pid_t)check(fork(), "fork");
        if (!child) {
            bind_to_cpu(once == ping);
            pong();
        }
        bind_to_cpu(0);
    } else {
        prepare(argv[2]);
    }
    uint64_t start = now_ns();
    while ((now = now_ns()) - start < length / 10) /* to warm up */
        once();
    uint64_t waited = waited_ns(getpid()), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    start = now_ns();
    do {
        /* The clock is not looked at each time: it would be a part of the shortest calls. */
        for (int i = 0; i < (once == list ? 1 : 16); i++, operations++)
            once();
        now = now_ns();
    } while (now - start < length);
    cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    waited = waited_ns(getpid()) - waited;
    if (child) {
        check(eventfd_write(there, 2), "eventfd_write");
        waitpid(child, NULL, 0);
    }
    printf("{\"operations\": %lu, \"ns\": %lu, \"cpu_ns\": %lu, \"waited_ns\": %lu}\n", operations,
           now - start, cpu, waited);
    return 0;
}
