/*
 * iscsiload: a closed-loop load over libiscsi, the same for every target.
 *
 * Usage: iscsiload URL read|write rand|seq BYTES QD SECONDS SPAN_MIB [CONNECTIONS]
 *        iscsiload URL fill SPAN_MIB
 *        iscsiload URL idle SESSIONS
 *
 * It keeps QD commands of BYTES each in flight on each of CONNECTIONS (1; each a session of its own, all served by
 * one poll loop), for SECONDS, within the first SPAN_MIB of the LUN, and prints one line of JSON. Each 4 KiB written
 * is unique (a counter) and half of it is zeros, so that a target that compresses has something to do, and one that
 * deduplicates has not. Reads go straight into a per-command buffer (iovec), without a copy by the library.
 *
 * fill writes the first SPAN_MIB once, in order, and prints nothing: reads of blocks never written are no reads.
 *
 * idle logs SESSIONS in, prints "ready", answers the target's pings and nothing else until its input ends.
 *
 * Exit code 1: the target failed a command or the connection.
 *
 * What it costs: libiscsi makes a system call for each request, and two for each answer with data (header, data).
 * rawload.c has the same loads in as few system calls as can be.
 */
#include "load.h"
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>
#include <poll.h>

struct conn {
	struct load *load;
	struct iscsi_context *iscsi;
	int lun;
};

struct slot {
	struct conn *conn;
	unsigned char *buf;
	struct scsi_iovec iov;
	uint64_t start;
};

struct load {
	int write, rand, bytes, conns, failed, inflight, stopping, once;
	uint32_t block; /* logical block size of the LUN */
	uint64_t units, next;
	struct conn *conn;
	struct pollfd *polls;
	struct tally tally;
};

static void start(struct slot *s);

static void finished(struct iscsi_context *iscsi, int status, void *data, void *priv)
{
	struct slot *s = priv;
	struct load *l = s->conn->load;
	if (status != SCSI_STATUS_GOOD) {
		struct scsi_task *t = data;
		if (!l->failed)
			fprintf(stderr, "iscsiload: command failed with status %d, sense %x/%04x: %s\n", status,
				t ? t->sense.key : 0, t ? t->sense.ascq : 0, iscsi_get_error(iscsi));
		l->failed = 1;
	}
	if (data)
		scsi_free_scsi_task(data);
	completed(&l->tally, s->start);
	l->inflight--;
	if (!l->stopping && !l->failed)
		start(s);
}

static void start(struct slot *s)
{
	struct conn *c = s->conn;
	struct load *l = c->load;
	if (l->once && l->next == l->units)
		return;
	uint64_t unit = l->rand ? xorshift(&l->tally.rng) % l->units : l->next++ % l->units;
	uint64_t lba = unit * (uint64_t)l->bytes / l->block;
	struct scsi_task *t;
	s->start = now_ns();
	if (l->write) {
		buffer_stamp(&l->tally, s->buf, l->bytes);
		t = iscsi_write16_iov_task(c->iscsi, c->lun, lba, NULL, l->bytes, l->block, 0, 0, 0, 0, 0, finished, s, &s->iov, 1);
	} else {
		t = iscsi_read16_iov_task(c->iscsi, c->lun, lba, l->bytes, l->block, 0, 0, 0, 0, 0, finished, s, &s->iov, 1);
	}
	if (!t) {
		fprintf(stderr, "iscsiload: cannot queue: %s\n", iscsi_get_error(c->iscsi));
		l->failed = 1;
		return;
	}
	l->inflight++;
}

/* serve waits for any connection and serves those that have something; extra is one more descriptor to wait for, or -1. */
static int serve(struct load *l, int extra)
{
	for (int i = 0; i < l->conns; i++)
		l->polls[i] = (struct pollfd){.fd = iscsi_get_fd(l->conn[i].iscsi), .events = iscsi_which_events(l->conn[i].iscsi)};
	l->polls[l->conns] = (struct pollfd){.fd = extra, .events = POLLIN};
	if (poll(l->polls, l->conns + 1, extra < 0 ? 30000 : -1) <= 0) {
		fprintf(stderr, "iscsiload: the target is silent for 30 s\n");
		return -1;
	}
	for (int i = 0; i < l->conns; i++) {
		if (l->polls[i].revents && iscsi_service(l->conn[i].iscsi, l->polls[i].revents) < 0) {
			fprintf(stderr, "iscsiload: %s\n", iscsi_get_error(l->conn[i].iscsi));
			return -1;
		}
	}
	return 0;
}

static int login(struct conn *c, const char *text, int number)
{
	struct iscsi_context *i = c->iscsi = iscsi_create_context("iqn.2026-11.io.ledge:bench");
	struct iscsi_url *url = iscsi_parse_full_url(i, text);
	if (!url) {
		fprintf(stderr, "iscsiload: %s\n", iscsi_get_error(i));
		return -1;
	}
	/* Sessions of one initiator are told apart by the ISID; the library's own is random, and may repeat. */
	iscsi_set_isid_random(i, (uint32_t)(now_ns() >> 10) & 0xffffff, number);
	iscsi_set_targetname(i, url->target);
	iscsi_set_session_type(i, ISCSI_SESSION_NORMAL);
	iscsi_set_header_digest(i, ISCSI_HEADER_DIGEST_NONE);
	iscsi_set_noautoreconnect(i, 1);
	c->lun = url->lun;
	if (iscsi_full_connect_sync(i, url->portal, c->lun)) {
		fprintf(stderr, "iscsiload: %s: %s\n", url->portal, iscsi_get_error(i));
		return -1;
	}
	iscsi_destroy_url(url);
	return 0;
}

static int login_all(struct load *l, const char *url, int n)
{
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	l->conn = calloc(n, sizeof *l->conn);
	l->polls = calloc(n + 1, sizeof *l->polls);
	for (l->conns = 0; l->conns < n; l->conns++) {
		l->conn[l->conns].load = l;
		if (login(&l->conn[l->conns], url, l->conns))
			return -1;
	}
	return 0;
}

static int idle(struct load *l)
{
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		if (serve(l, 0))
			return 1;
		if (l->polls[l->conns].revents)
			return 0;
	}
}

/* capacity sets the block size and how many units of the load's size there are in the span. */
static int capacity(struct load *l, uint64_t span)
{
	struct conn *c = &l->conn[0];
	struct scsi_task *t = iscsi_readcapacity16_sync(c->iscsi, c->lun);
	struct scsi_readcapacity16 *rc = t && t->status == SCSI_STATUS_GOOD ? scsi_datain_unmarshall(t) : NULL;
	if (!rc) {
		fprintf(stderr, "iscsiload: READ CAPACITY(16): %s\n", iscsi_get_error(c->iscsi));
		return -1;
	}
	l->block = rc->block_length;
	uint64_t size = (rc->returned_lba + 1) * (uint64_t)l->block;
	scsi_free_scsi_task(t);
	l->units = (span && span < size ? span : size) / l->bytes;
	return 0;
}

/* run keeps qd commands in flight on each connection until the time is over (once: until all is written), and waits for the last. */
static int run(struct load *l, int qd, double seconds)
{
	l->tally.stamp = now_ns() << 8;
	struct slot *slots = calloc(qd * l->conns, sizeof *slots);
	for (int i = 0; i < qd * l->conns; i++) {
		slots[i].conn = &l->conn[i / qd];
		slots[i].buf = buffer_new(&l->tally, l->bytes);
		slots[i].iov.iov_base = slots[i].buf;
		slots[i].iov.iov_len = l->bytes;
	}
	tally_begin(&l->tally, seconds);
	for (int i = 0; i < qd * l->conns; i++)
		start(&slots[i]);
	while (!l->failed && (l->once ? l->inflight > 0 : now_ns() < l->tally.end))
		if (serve(l, -1))
			return 1;
	tally_end(&l->tally);
	uint64_t done = l->tally.done;
	l->stopping = 1;
	while (!l->failed && l->inflight)
		if (serve(l, -1))
			return 1;
	if (l->failed)
		return 1;
	if (!l->once)
		tally_print(&l->tally, done, l->bytes);
	for (int i = 0; i < l->conns; i++) {
		iscsi_logout_sync(l->conn[i].iscsi);
		iscsi_destroy_context(l->conn[i].iscsi);
	}
	return 0;
}

int main(int argc, char **argv)
{
	static struct load l = {.tally.rng = 88172645463325252u};
	if (argc == 4 && !strcmp(argv[2], "idle"))
		return login_all(&l, argv[1], atoi(argv[3])) ? 1 : idle(&l);
	if (argc == 4 && !strcmp(argv[2], "fill")) {
		l.write = l.once = 1;
		l.bytes = 128 << 10;
		return login_all(&l, argv[1], 1) || capacity(&l, strtoull(argv[3], NULL, 10) << 20) ? 1 : run(&l, 8, 0);
	}
	if (argc < 8) {
		fprintf(stderr, "usage: iscsiload URL read|write rand|seq BYTES QD SECONDS SPAN_MIB [CONNECTIONS]\n"
				"       iscsiload URL fill SPAN_MIB\n"
				"       iscsiload URL idle SESSIONS\n");
		return 2;
	}
	l.write = !strcmp(argv[2], "write");
	l.rand = !strcmp(argv[3], "rand");
	l.bytes = atoi(argv[4]);
	int qd = atoi(argv[5]), conns = argc > 8 ? atoi(argv[8]) : 1;
	double seconds = atof(argv[6]);
	if (l.bytes < BLOCK || l.bytes % BLOCK || qd < 1 || qd > 1024 || conns < 1 || conns > 1024 || seconds <= 0) {
		fprintf(stderr, "iscsiload: BYTES is a multiple of 4096, QD and CONNECTIONS 1 to 1024, SECONDS above 0\n");
		return 2;
	}
	if (login_all(&l, argv[1], conns) || capacity(&l, strtoull(argv[7], NULL, 10) << 20))
		return 1;
	return run(&l, qd, seconds);
}
