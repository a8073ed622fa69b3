/*
 * Runs in a guest: does one kind of work on a mounted directory and prints how much it did in what
 * time, one JSON object a line. Static, without threads, so that it runs in any guest.
 *
 * Usage: guestload FOLDER MILLISECONDS FILES MIB WORKLOAD...
 * FOLDER holds `file` (MIB long) and `many` with FILES files. A WORKLOAD of the form NAME=COMMAND
 * is a shell command, run once in FOLDER. The guest's caches are dropped before each.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { MIB = 1 << 20 };

static uint64_t length, begun;
static unsigned files;
static int mib;
/* On a page: Linux splits a 9P read at the pages of its buffer, and one is to be one request. */
static _Alignas(PAGE) char buffer[MIB];

static void begin(void) {
    sync();
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd >= 0) {
        check(write(fd, "3", 1), "drop_caches");
        close(fd);
    }
    begun = now_ns();
}

static int time_is_up(void) { return now_ns() - begun >= length; }

static void say(const char *name, uint64_t operations) {
    uint64_t took = now_ns() - begun;
    printf("{\"what\": \"%s\", \"operations\": %llu, \"ns\": %llu}\n", name,
           (unsigned long long)operations, (unsigned long long)took);
    fflush(stdout);
}

static int open_file(const char *name, int flags) {
    return (int)check(open(name, flags | O_CLOEXEC, 0644), name);
}

static void pread4k(void) {
    int fd = open_file("file", O_RDONLY);
    uint64_t done = 0;
    begin();
    do {
        check(pread(fd, buffer, PAGE, (off_t)(done % 256 * PAGE)), "pread");
        done++;
    } while (!time_is_up());
    say("pread-4k", done);
    close(fd);
}

static void pwrite4k(void) {
    int fd = open_file("scratch", O_RDWR | O_CREAT);
    uint64_t done = 0;
    begin();
    do {
        check(pwrite(fd, buffer, PAGE, (off_t)(done % 256 * PAGE)), "pwrite");
        done++;
    } while (!time_is_up());
    say("pwrite-4k", done);
    close(fd);
    check(unlink("scratch"), "unlink");
}

static const char *name_of(const char *prefix, unsigned number) {
    static char names[2][64];
    static unsigned turn;
    turn = !turn;
    snprintf(names[turn], sizeof names[turn], "%s%u", prefix, number);
    return names[turn];
}

/* Each file once, with cold caches; then again and again, with warm ones. */
static void stat_all(void) {
    struct stat stat;
    uint64_t done = 0;
    begin();
    for (unsigned i = 0; i < files; i++)
        check(lstat(name_of("many/", i), &stat), "lstat");
    say("stat", files);
    begun = now_ns();
    do {
        check(lstat(name_of("many/", (unsigned)(done % files)), &stat), "lstat");
        done++;
    } while (done % 16 || !time_is_up());
    say("stat-again", done);
}

/* Names that are not there, as a compiler looks for headers in one folder after the other. */
static void stat_missing(void) {
    struct stat stat;
    uint64_t done = 0;
    begin();
    do {
        if (!lstat(name_of("many/missing", (unsigned)(done % files)), &stat))
            die("a name that should be missing");
        done++;
    } while (done % 16 || !time_is_up());
    say("stat-missing", done);
}

static void open_read_all(void) {
    begin();
    for (unsigned i = 0; i < files; i++) {
        int fd = open_file(name_of("many/", i), O_RDONLY);
        check(read(fd, buffer, PAGE), "read");
        close(fd);
    }
    say("open-read-close", files);
}

static void make_rename_unlink(void) {
    unsigned done = 0;
    check(mkdir("made", 0755), "mkdir");
    begin();
    do {
        int fd = open_file(name_of("made/", done), O_WRONLY | O_CREAT | O_EXCL);
        check(write(fd, "some words, not many\n", 21), "write");
        check(close(fd), "close");
    } while (++done < files && (done % 16 || !time_is_up()));
    say("create-write", done);
    begin();
    for (unsigned i = 0; i < done; i++)
        check(rename(name_of("made/", i), name_of("made/moved", i)), "rename");
    say("rename", done);
    begin();
    for (unsigned i = 0; i < done; i++)
        check(unlink(name_of("made/moved", i)), "unlink");
    say("unlink", done);
    check(rmdir("made"), "rmdir");
}

static void readdir_all(void) {
    uint64_t done = 0;
    begin();
    do {
        DIR *dir = opendir("many");
        if (!dir)
            die("many: %s", strerror(errno));
        while (readdir(dir))
            done++;
        closedir(dir);
    } while (!time_is_up());
    say("readdir-entries", done);
}

/* One entry after the other, each from where the last one ended, as NFS servers and shells do. */
static void seek_each(void) {
    uint64_t done = 0;
    long at = 0;
    DIR *dir = opendir("many");
    if (!dir)
        die("many: %s", strerror(errno));
    begin();
    do {
        seekdir(dir, at);
        at = readdir(dir) ? telldir(dir) : 0;
        done++;
    } while (!time_is_up());
    say("seekdir", done);
    closedir(dir);
}

static void read_all(void) {
    int fd = open_file("file", O_RDONLY);
    begin();
    for (int i = 0; i < mib; i++)
        if (check(read(fd, buffer, MIB), "read") != MIB)
            die("file is too short");
    say("read-mib", (uint64_t)mib);
    close(fd);
}

static void write_all(void) {
    int fd = open_file("written", O_WRONLY | O_CREAT | O_TRUNC);
    begin();
    for (int i = 0; i < mib; i++)
        if (check(write(fd, buffer, MIB), "write") != MIB)
            die("a short write");
    check(fsync(fd), "fsync");
    check(close(fd), "close");
    say("write-mib", (uint64_t)mib);
    check(unlink("written"), "unlink");
}

static void fsync_each(void) {
    int fd = open_file("synced", O_WRONLY | O_CREAT);
    uint64_t done = 0;
    begin();
    do {
        check(pwrite(fd, buffer, PAGE, 0), "pwrite");
        check(fsync(fd), "fsync");
        done++;
    } while (!time_is_up());
    say("write-fsync", done);
    close(fd);
    check(unlink("synced"), "unlink");
}

static void command(char *word) {
    char *text = strchr(word, '=');
    *text++ = 0;
    begin();
    int status = system(text);
    if (status)
        die("%s failed: status %d", word, status);
    say(word, 1);
}

static const struct {
    const char *name;
    void (*run)(void);
} workloads[] = {
    {"pread-4k", pread4k},
    {"pwrite-4k", pwrite4k},
    {"stat", stat_all},
    {"missing", stat_missing},
    {"open-read-close", open_read_all},
    {"files", make_rename_unlink},
    {"readdir", readdir_all},
    {"seekdir", seek_each},
    {"read", read_all},
    {"write", write_all},
    {"fsync", fsync_each},
};

int main(int argc, char **argv) {
    if (argc < 6)
        die("usage: guestload FOLDER MILLISECONDS FILES MIB WORKLOAD...");
    check(chdir(argv[1]), argv[1]);
    length = (uint64_t)atoll(argv[2]) * 1000000;
    files = (unsigned)atoi(argv[3]);
    mib = atoi(argv[4]);
    /* Pages of its own: the shared zero page of user-mode Linux lies outside what back ends see. */
    memset(buffer, 'x', sizeof buffer);
    for (int i = 5; i < argc; i++) {
        void (*run)(void) = NULL;
        for (size_t k = 0; k < sizeof workloads / sizeof *workloads; k++)
            if (!strcmp(workloads[k].name, argv[i]))
                run = workloads[k].run;
        if (run)
            run();
        else if (strchr(argv[i], '='))
            command(argv[i]);
        else
            die("%s: no such workload", argv[i]);
    }
    return 0;
}
