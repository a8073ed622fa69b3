/*
 * Signals to the front end. Call and error descriptors are eventfds, except in User-Mode Linux,
 * where they are stream sockets. The open file is shared with the front end, so its flags are not
 * ours to change: one that may block is asked first, for a front end must not stall us by not
 * reading.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* cdef-begin */
static void np_signal(int fd);
/* cdef-end */

enum signal_kind { SIGNAL_NONE, SIGNAL_EVENT, SIGNAL_BLOCKING, SIGNAL_SOCKET };

static enum signal_kind signal_kind(int fd) {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        return SIGNAL_NONE;
    if (S_ISSOCK(status.st_mode))
        return SIGNAL_SOCKET;
    return fcntl(fd, F_GETFL) & O_NONBLOCK ? SIGNAL_EVENT : SIGNAL_BLOCKING;
}

/* A failure to write means that the peer has a signal pending (EAGAIN) or is gone: no harm. */
static void send_signal(int fd, enum signal_kind kind) {
    const uint64_t one = 1;
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    ssize_t sent = 0;
    if (kind == SIGNAL_SOCKET)
        sent = send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
    else if (kind == SIGNAL_EVENT || (kind == SIGNAL_BLOCKING && poll(&ready, 1, 0) == 1))
        sent = write(fd, &one, sizeof(one));
    (void)sent;
}

static void np_signal(int fd) { send_signal(fd, signal_kind(fd)); }
