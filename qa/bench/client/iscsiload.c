/*
 * iscsiload: a closed-loop load over libiscsi, the same for every target.
 *
 * Usage: iscsiload URL read|write rand|seq BYTES QD SECONDS [SPAN_MIB]
 *
 * It keeps QD commands of BYTES each in flight on one connection, for SECONDS, within the
 * first SPAN_MIB of the LUN, and prints one JSON object. Each 4 KiB written is unique (a counter)
 * and half of it is zeros, so that a target that compresses has something to do, and one that
 * deduplicates has not. Reads go straight into a per-command buffer (iovec), without a copy
 * by the library. Exit code 1: the target failed a command or the connection.
 */
#include <inttypes.h>
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK 4096
#define BUCKETS 4096 /* log-linear: 64 per power of two of microseconds/16 */

struct slot {
	struct load *load;
	unsigned char *buf;
	struct scsi_iovec iov;
	uint64_t start;
	int busy;
};

struct load {
	struct iscsi_context *iscsi;
	int lun, write, rand, bytes, failed, inflight, stopping;
	uint32_t block; /* logical block size of the LUN */
	uint64_t units, next, rng, stamp;
	uint64_t done, hist[BUCKETS];
};

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static uint64_t xorshift(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

static int bucket(uint64_t ns)
{
	int e = 0;
	uint64_t v = ns / 100; /* tenths of a microsecond */
	while (v >= 128) {
		v >>= 1;
		e++;
	}
	int b = e * 64 + (int)v;
	return b < BUCKETS ? b : BUCKETS - 1;
}

static double bucket_us(int b)
{
	int e = b < 128 ? 0 : b / 64 - 1;
	return (double)((uint64_t)(b - e * 64) << e) / 10.0;
}

static void start(struct slot *s);

static void finished(struct iscsi_context *iscsi, int status, void *data, void *priv)
{
	struct slot *s = priv;
	struct load *l = s->load;
	(void)iscsi;
	if (status != SCSI_STATUS_GOOD) {
		struct scsi_task *t = data;
		if (!l->failed)
			fprintf(stderr, "iscsiload: command failed with status %d, sense %x/%04x: %s\n", status,
				t ? t->sense.key : 0, t ? t->sense.ascq : 0, iscsi_get_error(iscsi));
		l->failed = 1;
	}
	if (data)
		scsi_free_scsi_task(data);
	l->hist[bucket(now_ns() - s->start)]++;
	l->done++;
	l->inflight--;
	s->busy = 0;
	if (!l->stopping && !l->failed)
		start(s);
}

static void start(struct slot *s)
{
	struct load *l = s->load;
	uint64_t unit = l->rand ? xorshift(&l->rng) % l->units : l->next++ % l->units;
	uint64_t lba = unit * (uint64_t)l->bytes / l->block;
	struct scsi_task *t;
	s->start = now_ns();
	if (l->write) {
		for (int o = 0; o < l->bytes; o += BLOCK) {
			uint64_t v = ++l->stamp;
			memcpy(s->buf + o, &v, sizeof v);
		}
		t = iscsi_write16_iov_task(l->iscsi, l->lun, lba, NULL, l->bytes, l->block, 0, 0, 0, 0, 0, finished, s, &s->iov, 1);
	} else {
		t = iscsi_read16_iov_task(l->iscsi, l->lun, lba, l->bytes, l->block, 0, 0, 0, 0, 0, finished, s, &s->iov, 1);
	}
	if (!t) {
		fprintf(stderr, "iscsiload: cannot queue: %s\n", iscsi_get_error(l->iscsi));
		l->failed = 1;
		return;
	}
	s->busy = 1;
	l->inflight++;
}

static int serve(struct load *l)
{
	struct pollfd p = {.fd = iscsi_get_fd(l->iscsi), .events = iscsi_which_events(l->iscsi)};
	if (poll(&p, 1, 30000) <= 0) {
		fprintf(stderr, "iscsiload: the target is silent for 30 s\n");
		return -1;
	}
	if (iscsi_service(l->iscsi, p.revents) < 0) {
		fprintf(stderr, "iscsiload: %s\n", iscsi_get_error(l->iscsi));
		return -1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct load l = {.rng = 88172645463325252u};
	if (argc < 7) {
		fprintf(stderr, "usage: iscsiload URL read|write rand|seq BYTES QD SECONDS [SPAN_MIB]\n");
		return 2;
	}
	l.write = !strcmp(argv[2], "write");
	l.rand = !strcmp(argv[3], "rand");
	l.bytes = atoi(argv[4]);
	int qd = atoi(argv[5]);
	double seconds = atof(argv[6]);
	uint64_t span = (argc > 7 ? strtoull(argv[7], NULL, 10) : 0) << 20;
	if (l.bytes < BLOCK || l.bytes % BLOCK || qd < 1 || qd > 1024 || seconds <= 0) {
		fprintf(stderr, "iscsiload: BYTES is a multiple of 4096, QD 1 to 1024, SECONDS above 0\n");
		return 2;
	}
	l.iscsi = iscsi_create_context("iqn.2026-11.io.ledge:bench");
	struct iscsi_url *url = iscsi_parse_full_url(l.iscsi, argv[1]);
	if (!url) {
		fprintf(stderr, "iscsiload: %s\n", iscsi_get_error(l.iscsi));
		return 2;
	}
	iscsi_set_targetname(l.iscsi, url->target);
	iscsi_set_session_type(l.iscsi, ISCSI_SESSION_NORMAL);
	iscsi_set_header_digest(l.iscsi, ISCSI_HEADER_DIGEST_NONE);
	l.lun = url->lun;
	if (iscsi_full_connect_sync(l.iscsi, url->portal, l.lun)) {
		fprintf(stderr, "iscsiload: %s: %s\n", url->portal, iscsi_get_error(l.iscsi));
		return 1;
	}
	struct scsi_task *t = iscsi_readcapacity16_sync(l.iscsi, l.lun);
	struct scsi_readcapacity16 *rc = t ? scsi_datain_unmarshall(t) : NULL;
	if (!rc) {
		fprintf(stderr, "iscsiload: READ CAPACITY(16): %s\n", iscsi_get_error(l.iscsi));
		return 1;
	}
	l.block = rc->block_length;
	uint64_t size = (rc->returned_lba + 1) * (uint64_t)l.block;
	scsi_free_scsi_task(t);
	if (span && span < size)
		size = span;
	l.units = size / l.bytes;
	l.stamp = now_ns() << 8;

	struct slot *slots = calloc(qd, sizeof *slots);
	for (int i = 0; i < qd; i++) {
		struct slot *s = &slots[i];
		s->load = &l;
		s->buf = aligned_alloc(BLOCK, l.bytes);
		for (int o = 0; o < l.bytes; o += 8) {
			uint64_t v = o % BLOCK < BLOCK / 2 ? xorshift(&l.rng) : 0;
			memcpy(s->buf + o, &v, 8);
		}
		s->iov.iov_base = s->buf;
		s->iov.iov_len = l.bytes;
	}
	uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9);
	for (int i = 0; i < qd; i++)
		start(&slots[i]);
	while (!l.failed && now_ns() < end)
		if (serve(&l))
			return 1;
	uint64_t took = now_ns() - begin, done = l.done;
	l.stopping = 1;
	while (!l.failed && l.inflight)
		if (serve(&l))
			return 1;
	if (l.failed)
		return 1;
	double p[3] = {0.5, 0.99, 0.999}, us[3] = {0};
	for (int i = 0; i < 3; i++) {
		uint64_t sum = 0;
		for (int b = 0; b < BUCKETS; b++) {
			sum += l.hist[b];
			if (sum >= p[i] * l.done) {
				us[i] = bucket_us(b);
				break;
			}
		}
	}
	double s = took / 1e9;
	printf("{\"ops\":%" PRIu64 ",\"seconds\":%.3f,\"iops\":%.1f,\"mbps\":%.2f,\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f}\n",
	       done, s, done / s, done * (double)l.bytes / s / 1e6, us[0], us[1], us[2]);
	iscsi_logout_sync(l.iscsi);
	iscsi_destroy_context(l.iscsi);
	return 0;
}
