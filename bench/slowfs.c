/*
 * A FUSE file system, straight on /dev/fuse, with three files: `small` and `file` answer at once,
 * a read of `slow` takes a time. What others do meanwhile must not notice.
 *
 * Usage: slowfs MOUNTPOINT MILLISECONDS. Prints "ready" when mounted; ends when unmounted.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>

enum { SMALL = 2, LAST = 4, PENDING = 64, BUFFER = 256 * KIB, VALID_SECONDS = 3600 };

static const char *const names[] = {[SMALL] = "small", "file", "slow"};
static int fuse;
static uint64_t delay_ns;
static struct {
    uint64_t unique, due;
    uint32_t size;
} pending[PENDING];
static uint8_t data[BUFFER];

static void answer(uint64_t unique, int error, const void *body, size_t size) {
    struct fuse_out_header header = {(uint32_t)(sizeof header + size), -error, unique};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)body, size}};
    if (writev(fuse, parts, 2) < 0 && errno != ENOENT)
        die("/dev/fuse: %s", strerror(errno));
}

static struct fuse_attr attributes(uint64_t node) {
    int is_root = node == FUSE_ROOT_ID;
    return (struct fuse_attr){
        .ino = node,
        .size = is_root ? 0 : FILE_SPAN,
        .mode = is_root ? S_IFDIR | 0755 : S_IFREG | 0644,
        .nlink = 1,
        .blksize = PAGE,
    };
}

static void look_up(uint64_t unique, const char *name) {
    for (uint64_t node = SMALL; node <= LAST; node++)
        if (!strcmp(name, names[node])) {
            struct fuse_entry_out entry = {
                .nodeid = node,
                .entry_valid = VALID_SECONDS,
                .attr_valid = VALID_SECONDS,
                .attr = attributes(node),
            };
            answer(unique, 0, &entry, sizeof entry);
            return;
        }
    answer(unique, ENOENT, NULL, 0);
}

static void read_later(uint64_t unique, uint32_t size) {
    for (int i = 0; i < PENDING; i++)
        if (!pending[i].unique) {
            pending[i].unique = unique;
            pending[i].due = now_ns() + delay_ns;
            pending[i].size = size;
            return;
        }
    answer(unique, EIO, NULL, 0);
}

static void serve(const struct fuse_in_header *header, const void *body) {
    uint64_t unique = header->unique;
    switch (header->opcode) {
    case FUSE_INIT: {
        struct fuse_init_out init = {.major = FUSE_KERNEL_VERSION,
                                     .minor = 31,
                                     .max_readahead = BUFFER,
                                     .max_background = PENDING,
                                     .max_write = BUFFER / 2,
                                     .time_gran = 1};
        answer(unique, 0, &init, sizeof init);
        break;
    }
    case FUSE_LOOKUP:
        look_up(unique, body);
        break;
    case FUSE_GETATTR: {
        struct fuse_attr_out out = {.attr_valid = VALID_SECONDS,
                                    .attr = attributes(header->nodeid)};
        answer(unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
        struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO};
        answer(unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_READ: {
        uint32_t size = ((const struct fuse_read_in *)body)->size;
        size = size < BUFFER ? size : BUFFER;
        if (header->nodeid == LAST)
            read_later(unique, size);
        else
            answer(unique, 0, data, size);
        break;
    }
    case FUSE_STATFS: {
        struct fuse_statfs_out out = {.st = {.bsize = PAGE, .namelen = 255}};
        answer(unique, 0, &out, sizeof out);
        break;
    }
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
        answer(unique, 0, NULL, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break; /* these have no answer */
    default:
        answer(unique, ENOSYS, NULL, 0);
    }
}

/* Milliseconds until the next delayed answer, having sent those that are due; -1: there is none. */
static int send_due(void) {
    uint64_t now = now_ns(), next = UINT64_MAX;
    for (int i = 0; i < PENDING; i++) {
        if (pending[i].unique && pending[i].due <= now) {
            answer(pending[i].unique, 0, data, pending[i].size);
            pending[i].unique = 0;
        }
        if (pending[i].unique && pending[i].due < next)
            next = pending[i].due;
    }
    return next == UINT64_MAX ? -1 : (int)((next - now) / 1000000 + 1);
}

int main(int argc, char **argv) {
    static uint8_t request[BUFFER + PAGE] __attribute__((aligned(8)));
    char options[64];
    if (argc != 3)
        die("usage: slowfs MOUNTPOINT MILLISECONDS");
    delay_ns = (uint64_t)atoll(argv[2]) * 1000000;
    fuse = (int)check(open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK), "/dev/fuse");
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other",
             fuse);
    check(mount("slowfs", argv[1], "fuse", MS_NOSUID | MS_NODEV, options), argv[1]);
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct pollfd wait = {fuse, POLLIN, 0};
        if (poll(&wait, 1, send_due()) <= 0)
            continue;
        ssize_t size = read(fuse, request, sizeof request);
        if (size >= (ssize_t)sizeof(struct fuse_in_header))
            serve((const void *)request, request + sizeof(struct fuse_in_header));
        else if (size < 0 && errno == ENODEV)
            return 0;
    }
}
