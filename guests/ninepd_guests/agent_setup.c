/* Part of agent.c: what makes a system of a bare kernel, and what must be undone at its end. */
#include <dirent.h>
#include <fcntl.h>
#include <mntent.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static void mount_on(const char *type, const char *where, const char *options) {
    if (mkdir(where, 0755) && errno != EEXIST)
        die(where);
    if (mount(type, where, type, 0, options) && errno != EBUSY)
        die(where);
}

static void load_modules(void) {
    struct dirent **names;
    int n = scandir("/modules", &names, NULL, alphasort);

    for (int i = 0; i < n; i++) {
        char path[300];
        int fd;

        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (*names[i]->d_name != '.' && (fd < 0 || syscall(SYS_finit_module, fd, "", 0)) &&
            errno != EEXIST)
            fprintf(stderr, "ninepd guest agent: %s: %s\n", path, strerror(errno));
        close(fd);
    }
}

static void loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request))
        perror("ninepd guest agent: lo");
    close(fd);
}

static void set_up(void) {
    umask(022);
    mount_on("proc", "/proc", NULL);
    mount_on("sysfs", "/sys", NULL);
    mount_on("devtmpfs", "/dev", NULL);
    mount_on("devpts", "/dev/pts", "mode=620,ptmxmode=666");
    mount_on("tmpfs", "/dev/shm", "mode=1777");
    mount_on("tmpfs", "/tmp", "mode=1777");
    load_modules();
    loopback_up();
}

/* Newest first, as they may be stacked. A 9p mount left at power-off would cut its server short. */
static void unmount_shares(void) {
    struct {
        char *path;
        bool share;
    } mounts[256];
    int n = 0;
    FILE *table = setmntent("/proc/mounts", "r");

    if (!table)
        return;
    for (struct mntent *m; n < 256 && (m = getmntent(table)); n++) {
        mounts[n].path = strdup(m->mnt_dir);
        mounts[n].share = !strcmp(m->mnt_type, "9p") || !strcmp(m->mnt_type, "overlay");
    }
    endmntent(table);
    while (n--)
        if (mounts[n].share && umount2(mounts[n].path, 0) && umount2(mounts[n].path, MNT_DETACH))
            perror(mounts[n].path);
}
