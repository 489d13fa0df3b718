/*
 * A connection of rawload: bytes in and out, the login, and what is asked once before the load.
 */
#include "load.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define min(a, b) ((int64_t)(a) < (int64_t)(b) ? (int64_t)(a) : (int64_t)(b))
#define MAX_RECEIVE (256 << 10) /* as libiscsi declares */
#define MAX_BURST (256 << 10)
#define PIECES 1024 /* of one sendmsg: the kernel's limit */

struct slot {
	uint8_t header[48], *out; /* out: headers of Data-Out */
	unsigned char *buf;
	uint64_t start;
	int busy;
};

struct raw {
	struct load *load;
	int fd, lun, block;
	uint32_t cmd_sn, exp_stat_sn, max_cmd_sn;
	int immediate, max_send, first_burst, data_headers;
	struct slot *slots, **idle;
	int idles, inflight;
	uint8_t in[48], pong[48];
	int have;
	uint32_t skip;
	struct iovec *iov; /* what is queued: from sent on, queued pieces */
	int sent, queued, room;
};

struct load {
	int write, rand, bytes, qd, conns, stopping;
	uint64_t units, next;
	struct raw *conn;
	struct pollfd *polls;
	struct tally tally;
};

static void die(const char *why)
{
	fprintf(stderr, "rawload: %s (%s)\n", why, strerror(errno));
	exit(1);
}

static void put24(uint8_t *p, uint32_t v) { p[0] = v >> 16; p[1] = v >> 8; p[2] = v; }
static void put32(uint8_t *p, uint32_t v) { p[0] = v >> 24; put24(p + 1, v); }
static uint32_t get24(const uint8_t *p) { return (uint32_t)p[0] << 16 | p[1] << 8 | p[2]; }
static uint32_t get32(const uint8_t *p) { return (uint32_t)p[0] << 24 | get24(p + 1); }

static void queue(struct raw *c, void *p, size_t n)
{
	if (!n)
		return;
	if (c->sent + c->queued == c->room) {
		memmove(c->iov, c->iov + c->sent, (size_t)c->queued * sizeof *c->iov);
		c->sent = 0;
		if (c->queued == c->room && !(c->iov = realloc(c->iov, (size_t)(c->room *= 2) * sizeof *c->iov)))
			die("memory");
	}
	c->iov[c->sent + c->queued++] = (struct iovec){p, n};
}

/* flush sends what is queued as far as the socket takes it. */
static void flush(struct raw *c)
{
	while (c->queued) {
		struct msghdr m = {.msg_iov = c->iov + c->sent, .msg_iovlen = (size_t)min(c->queued, PIECES)};
		ssize_t n = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0)
			die("send");
		while (n > 0) {
			struct iovec *v = &c->iov[c->sent];
			size_t k = (size_t)min(n, v->iov_len);
			v->iov_base = (uint8_t *)v->iov_base + k;
			v->iov_len -= k;
			n -= (ssize_t)k;
			if (!v->iov_len) {
				c->sent++;
				c->queued--;
			}
		}
	}
	c->sent = 0;
}

/* ping answers a NOP-In that asks for it (RFC 7143 11.19). A second one before the first answer left is one too many for it. */
static void ping(struct raw *c, const uint8_t *h)
{
	if (get32(h + 20) == 0xffffffff)
		return;
	memset(c->pong, 0, 48);
	c->pong[0] = 0x40;
	c->pong[1] = 0x80;
	memcpy(c->pong + 8, h + 8, 8);
	put32(c->pong + 16, 0xffffffff);
	memcpy(c->pong + 20, h + 20, 4);
	put32(c->pong + 24, c->cmd_sn);
	put32(c->pong + 28, c->exp_stat_sn);
	queue(c, c->pong, 48);
}

static void take(struct raw *c, uint8_t *p, size_t n)
{
	if (n && recv(c->fd, p, n, MSG_WAITALL) != (ssize_t)n)
		die("receive");
}

/* exchange sends one PDU and returns the header of its answer; text takes its data segment, ended by a zero. */
static void exchange(struct raw *c, uint8_t *h, const char *data, size_t n, uint8_t *answer, char *text, size_t room)
{
	static char zeros[4];
	put24(h + 5, (uint32_t)n);
	put32(h + 28, c->exp_stat_sn);
	struct iovec v[3] = {{h, 48}, {(void *)data, n}, {zeros, -n & 3}};
	if (writev(c->fd, v, 3) != (ssize_t)(48 + ((n + 3) & ~(size_t)3)))
		die("send");
	take(c, answer, 48);
	uint32_t k = get24(answer + 5);
	if (((k + 3) & ~3u) >= room)
		die("an answer that is too long");
	take(c, (uint8_t *)text, (k + 3) & ~3u);
	text[k] = 0;
	c->exp_stat_sn = get32(answer + 24) + 1;
	c->max_cmd_sn = get32(answer + 32);
}

static int number(const char *text, size_t n, const char *key, int otherwise)
{
	for (const char *p = text; p < text + n; p += strlen(p) + 1)
		if (!strncmp(p, key, strlen(key)) && p[strlen(key)] == '=')
			return p[strlen(key) + 1] == 'Y' ? 1 : atoi(p + strlen(key) + 1);
	return otherwise;
}

static void login(struct raw *c, const char *target, int nth)
{
	static char text[1 << 16];
	uint8_t h[48], r[48];
	char keys[1024];
	uint32_t isid = (uint32_t)(now_ns() >> 10) & 0xffffff;
	int n = snprintf(keys, sizeof keys,
		"InitiatorName=iqn.2026-11.io.ledge:bench%cTargetName=%s%cSessionType=Normal%cAuthMethod=None%c", 0, target, 0, 0, 0);
	for (int stage = 0; stage != 3;) {
		memset(h, 0, 48);
		h[0] = 0x43;
		h[1] = (uint8_t)(0x80 | stage << 2 | (stage ? 3 : 1));
		h[8] = 0x80; /* ISID of type random; it tells this initiator's sessions apart */
		put24(h + 9, isid);
		h[12] = (uint8_t)(nth >> 8);
		h[13] = (uint8_t)nth;
		put32(h + 24, 1);
		exchange(c, h, keys, (size_t)n, r, text, sizeof text);
		if ((r[0] & 0x3f) != 0x23 || r[36] || !(r[1] & 0x80))
			die("the login is refused");
		stage = r[1] & 3;
		if (stage == 3)
			break;
		n = snprintf(keys, sizeof keys, "HeaderDigest=None%cDataDigest=None%cInitialR2T=Yes%cImmediateData=Yes%cMaxBurstLength=%d%c"
			"FirstBurstLength=%d%cMaxRecvDataSegmentLength=%d%cMaxOutstandingR2T=1%cMaxConnections=1%cErrorRecoveryLevel=0%c"
			"DefaultTime2Wait=2%cDefaultTime2Retain=0%cDataPDUInOrder=Yes%cDataSequenceInOrder=Yes%c",
			0, 0, 0, 0, MAX_BURST, 0, MAX_BURST, 0, MAX_RECEIVE, 0, 0, 0, 0, 0, 0, 0, 0);
	}
	size_t got = get24(r + 5);
	c->immediate = number(text, got, "ImmediateData", 1);
	c->max_send = number(text, got, "MaxRecvDataSegmentLength", 8192);
	c->first_burst = (int)min(number(text, got, "FirstBurstLength", MAX_BURST), MAX_BURST);
	c->data_headers = (MAX_BURST + c->max_send - 1) / c->max_send;
	c->cmd_sn = 1;
}

/* once sends a CDB and returns the SCSI status; data takes what comes. */
static int once(struct raw *c, uint8_t op, int expect, uint8_t *data)
{
	uint8_t h[48] = {0x01, (uint8_t)(0x81 | (expect ? 0x40 : 0))}, r[48];
	char text[4096];
	h[9] = (uint8_t)c->lun;
	put32(h + 20, (uint32_t)expect);
	put32(h + 24, c->cmd_sn++);
	h[32] = op;
	exchange(c, h, "", 0, r, text, sizeof text);
	if (data)
		memcpy(data, text, (size_t)expect);
	if ((r[0] & 0x3f) == 0x25 && !(r[1] & 1)) { /* the status comes by itself */
		take(c, r, 48);
		c->exp_stat_sn = get32(r + 24) + 1;
	}
	return r[3];
}

/* raw_open logs the nth connection in to url (iscsi://IPV4:PORT/TARGET/LUN) and makes its slots. */
static void raw_open(struct load *l, struct raw *c, const char *url, int nth)
{
	char ip[64], target[256];
	int port, on = 1;
	if (sscanf(url, "iscsi://%63[^:]:%d/%255[^/]/%d", ip, &port, target, &c->lun) != 4)
		die("URL is iscsi://IPV4:PORT/TARGET/LUN");
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	if (inet_pton(AF_INET, ip, &a.sin_addr) != 1 || (c->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0 ||
	    connect(c->fd, (struct sockaddr *)&a, sizeof a) || setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on))
		die("connect");
	c->load = l;
	login(c, target, nth);
	for (int i = 0; i < 10 && once(c, 0x00, 0, NULL); i++) /* TEST UNIT READY takes what unit attentions there are */
		;
	uint8_t capacity[8] = {0};
	if (once(c, 0x25, 8, capacity) || (c->block = (int)get32(capacity + 4)) < 512)
		die("READ CAPACITY(10)");
	uint64_t units = ((uint64_t)get32(capacity) + 1) * (uint64_t)c->block / (uint64_t)l->bytes;
	if (!l->units || units < l->units)
		l->units = units;
	c->room = 64;
	c->iov = malloc((size_t)c->room * sizeof *c->iov);
	c->slots = calloc((size_t)l->qd, sizeof *c->slots);
	c->idle = calloc((size_t)l->qd, sizeof *c->idle);
	for (int i = 0; i < l->qd; i++) {
		c->slots[i].buf = buffer_new(&l->tally, l->bytes);
		c->slots[i].out = malloc(48 * (size_t)c->data_headers);
		c->idle[c->idles++] = &c->slots[i];
	}
}
