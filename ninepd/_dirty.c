/*
 * The dirty log: a bitmap shared with the front end, a bit for each page of guest memory that the
 * device wrote to (QEMU docs/interop/vhost-user.rst, "Migration"). The front end clears a bit and
 * then copies the page; so a page is written first and marked afterwards, by an atomic OR. Comes
 * behind _memory.c and _signals.c.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

/* cdef-begin */
typedef struct np_log np_log;

enum { NP_LOG_PAGE = 4096 };

static np_log *np_log_new(void);
static int np_log_map(np_log *log, uint64_t size, uint64_t offset, int fd);
static void np_log_set_signal(np_log *log, int fd);
static uint64_t np_log_skipped(np_log *log);
static void np_log_free(np_log *log);
/* cdef-end */

struct np_log {
    struct shared shared;
    uint64_t size; /* in bytes; 0: nothing is mapped yet */
    int signal;    /* tells of new marks; -1 if nobody wants to know */
    enum signal_kind signal_kind;
    bool marked; /* since the last signal */
    atomic_int lost;
    _Atomic uint64_t skipped; /* pages that the log is too small for */
};

static np_log *np_log_new(void) {
    np_log *log = calloc(1, sizeof(*log));
    if (log)
        log->signal = -1;
    return log;
}

/* Once for each log. */
static int np_log_map(np_log *log, uint64_t size, uint64_t offset, int fd) {
    int error = map_shared(&log->shared, size, offset, fd, &log->lost);
    if (!error)
        log->size = size;
    return error;
}

static void np_log_free(np_log *log) {
    if (log->size)
        unmap_shared(&log->shared);
    free(log);
}

static void np_log_set_signal(np_log *log, int fd) {
    log->signal = fd;
    log->signal_kind = signal_kind(fd);
}

static uint64_t np_log_skipped(np_log *log) { return atomic_load(&log->skipped); }

/* Guest physical [gpa, gpa + len) was written. The size of the log is the front end's business: a
 * page beyond it is skipped. */
static void mark_dirty(np_log *log, uint64_t gpa, uint64_t len) {
    if (!log || !len)
        return;
    uint64_t last = (len - 1 > UINT64_MAX - gpa ? UINT64_MAX : gpa + len - 1) / NP_LOG_PAGE;
    _Atomic uint8_t *bits = (_Atomic uint8_t *)log->shared.host;
    for (uint64_t page = gpa / NP_LOG_PAGE; page <= last; page++) {
        if (page / 8 < log->size)
            atomic_fetch_or(&bits[page / 8], (uint8_t)(1 << page % 8));
        else
            atomic_fetch_add(&log->skipped, 1);
    }
    log->marked = true;
}

static void announce_marks(np_log *log) {
    if (log && log->marked) {
        log->marked = false;
        send_signal(log->signal, log->signal_kind);
    }
}
