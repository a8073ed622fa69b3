/*
 * Tells when the thread that serves a ring does not come back from a request.
 *
 * The serving thread counts: up by one when it sets to work on a batch, up by one when it goes to
 * wait for the next. The watcher looks at the count once a tick; an odd one that has not moved says
 * that a batch has been under way for all of that tick. What is to be done about it is Python's
 * business. While the ring is quiet the watcher sleeps without a time-out, so an idle device wakes
 * nobody; the serving thread wakes it with its next batch, which costs one system call then and
 * one load otherwise.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* cdef-begin */
typedef struct np_watch np_watch;

static np_watch *np_watch_new(uint32_t tick_us);
static void np_watch_free(np_watch *w);
static int np_watch_wait(np_watch *w);
static void np_watch_rest(np_watch *w);
static void np_watch_stop(np_watch *w);
/* cdef-end */

#define QUIET_TICKS 16 /* so long it looks at a waiting thread before it sleeps itself */

struct np_watch {
    _Atomic uint32_t turn;   /* odd: the serving thread is at work on a batch */
    _Atomic uint32_t asleep; /* a futex: 1 while the watcher wants to be woken */
    atomic_bool stopped;
    uint32_t tick_us;
};

static np_watch *np_watch_new(uint32_t tick_us) {
    np_watch *w = calloc(1, sizeof(*w));
    if (w)
        w->tick_us = tick_us;
    return w;
}

static void np_watch_free(np_watch *w) { free(w); }

static void wake_watcher(np_watch *w) {
    if (atomic_exchange(&w->asleep, 0))
        syscall(SYS_futex, &w->asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* The two marks of the serving thread. Sequentially consistent, like the watcher's look before it
 * sleeps: either it sees the new count, or we see that it sleeps. */
static void watch_work(np_watch *w) {
    if (!w)
        return;
    atomic_store(&w->turn, atomic_load_explicit(&w->turn, memory_order_relaxed) | 1);
    if (atomic_load(&w->asleep))
        wake_watcher(w);
}

static void watch_rest(np_watch *w) {
    uint32_t turn = w ? atomic_load_explicit(&w->turn, memory_order_relaxed) : 0;
    if (turn & 1)
        atomic_store_explicit(&w->turn, turn + 1, memory_order_relaxed);
}

/* The serving thread leaves the ring. */
static void np_watch_rest(np_watch *w) { watch_rest(w); }

/* From any thread: np_watch_wait() returns 0 from now on. */
static void np_watch_stop(np_watch *w) {
    atomic_store(&w->stopped, true);
    wake_watcher(w);
}

/* Blocks until one batch has been under way for a whole tick: 1. Or until the stop: 0. */
static int np_watch_wait(np_watch *w) {
    const struct timespec tick = {.tv_sec = w->tick_us / 1000000,
                                  .tv_nsec = (long)(w->tick_us % 1000000) * 1000};
    for (uint32_t quiet = 0; !atomic_load(&w->stopped);) {
        uint32_t turn = atomic_load(&w->turn);
        if (turn & 1 || quiet++ < QUIET_TICKS) {
            nanosleep(&tick, NULL);
            if (atomic_load(&w->turn) != turn)
                quiet = 0;
            else if (turn & 1)
                return 1;
            continue;
        }
        atomic_store(&w->asleep, 1);
        if (atomic_load(&w->turn) == turn && !atomic_load(&w->stopped))
            syscall(SYS_futex, &w->asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
        atomic_store(&w->asleep, 0);
        quiet = 0;
    }
    return 0;
}
