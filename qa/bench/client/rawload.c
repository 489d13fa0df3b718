/*
 * rawload: the loads of iscsiload.c in as few system calls as can be, so that the target is the limit and not the client.
 *
 * Usage: rawload URL read|write rand|seq BYTES QD SECONDS SPAN_MIB [CONNECTIONS]
 *
 * One read takes what answers have come, of as many commands as there are; one sendmsg sends the commands that follow
 * them. Data read stays in the receive buffer, written data goes out of per-command buffers. It speaks just as much
 * iSCSI as that needs (raw.h): a login, READ(10), WRITE(10) with immediate data and R2T, pings. Output as iscsiload's.
 */
#include "raw.h"

static void command(struct raw *c, struct slot *s)
{
	struct load *l = c->load;
	uint64_t unit = l->rand ? xorshift(&l->tally.rng) % l->units : l->next++ % l->units;
	s->start = now_ns();
	s->busy = 1;
	uint8_t *h = s->header;
	memset(h, 0, 48);
	h[0] = 0x01;
	h[1] = 0x80 | (l->write ? 0x20 : 0x40) | 1; /* simple task */
	h[9] = (uint8_t)c->lun;
	put32(h + 16, (uint32_t)(s - c->slots));
	put32(h + 20, (uint32_t)l->bytes);
	put32(h + 24, c->cmd_sn++);
	put32(h + 28, c->exp_stat_sn);
	h[32] = l->write ? 0x2a : 0x28;
	put32(h + 34, (uint32_t)(unit * (uint64_t)l->bytes / c->block));
	h[39] = (uint8_t)(l->bytes / c->block >> 8);
	h[40] = (uint8_t)(l->bytes / c->block);
	c->inflight++;
	if (!l->write) {
		queue(c, h, 48);
		return;
	}
	buffer_stamp(&l->tally, s->buf, l->bytes);
	int now = c->immediate ? min(l->bytes, min(c->first_burst, c->max_send)) : 0;
	put24(h + 5, (uint32_t)now);
	queue(c, h, 48);
	queue(c, s->buf, (size_t)now);
}

/* transfer answers an R2T. One of a command is outstanding at a time, so its headers are the slot's. */
static void transfer(struct raw *c, const uint8_t *r)
{
	struct load *l = c->load;
	uint32_t tag = get32(r + 16), offset = get32(r + 40), want = get32(r + 44);
	if (tag >= (uint32_t)l->qd || !c->slots[tag].busy || (uint64_t)offset + want > (uint64_t)l->bytes)
		die("R2T beyond a command");
	struct slot *s = &c->slots[tag];
	if ((want + c->max_send - 1) / c->max_send > (uint32_t)c->data_headers)
		die("R2T beyond MaxBurstLength");
	for (uint32_t at = 0, sn = 0; at < want; sn++) {
		uint32_t k = (uint32_t)min(want - at, c->max_send);
		uint8_t *h = s->out + 48 * sn;
		memset(h, 0, 48);
		h[0] = 0x05;
		h[1] = at + k == want ? 0x80 : 0;
		put24(h + 5, k);
		h[9] = (uint8_t)c->lun;
		put32(h + 16, tag);
		memcpy(h + 20, r + 20, 4);
		put32(h + 28, c->exp_stat_sn);
		put32(h + 36, sn);
		put32(h + 40, offset + at);
		queue(c, h, 48);
		queue(c, s->buf + offset + at, k);
		at += k;
	}
}

static void ended(struct raw *c, const uint8_t *h)
{
	uint32_t tag = get32(h + 16);
	if (tag >= (uint32_t)c->load->qd || !c->slots[tag].busy)
		die("an answer to no command");
	if (h[3] != 0)
		die("a command failed");
	c->exp_stat_sn = get32(h + 24) + 1;
	completed(&c->load->tally, c->slots[tag].start);
	c->slots[tag].busy = 0;
	c->inflight--;
	c->idle[c->idles++] = &c->slots[tag];
}

static void answer(struct raw *c, const uint8_t *h)
{
	if ((int32_t)(get32(h + 32) - c->max_cmd_sn) > 0)
		c->max_cmd_sn = get32(h + 32);
	switch (h[0] & 0x3f) {
	case 0x25:
		if (h[1] & 1)
			ended(c, h);
		break;
	case 0x21:
		ended(c, h);
		break;
	case 0x31:
		transfer(c, h);
		break;
	case 0x20:
		ping(c, h);
		break;
	default:
		die("an answer that it does not know");
	}
}

/* receive takes what has come with one read, and looks at the headers in it; data is passed over. */
static void receive(struct raw *c, uint8_t *buf, size_t size)
{
	ssize_t n = recv(c->fd, buf, size, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0)
		die("the target closed the connection");
	for (uint8_t *b = buf, *end = buf + n; b < end;) {
		if (c->have < 48) {
			size_t k = (size_t)min(48 - c->have, end - b);
			memcpy(c->in + c->have, b, k);
			c->have += (int)k;
			b += k;
			if (c->have < 48)
				break;
			c->skip = (get24(c->in + 5) + 3) & ~3u;
		}
		size_t k = (size_t)min(c->skip, end - b);
		c->skip -= (uint32_t)k;
		b += k;
		if (c->skip)
			break;
		c->have = 0;
		answer(c, c->in);
	}
}

/* submit sends commands while there are free slots and the target's window is open. */
static void submit(struct raw *c)
{
	while (!c->load->stopping && c->idles && (int32_t)(c->max_cmd_sn - c->cmd_sn) >= 0)
		command(c, c->idle[--c->idles]);
	flush(c);
}

static void serve(struct load *l, uint8_t *buf, size_t size)
{
	for (int i = 0; i < l->conns; i++)
		l->polls[i] = (struct pollfd){.fd = l->conn[i].fd, .events = POLLIN | (l->conn[i].queued ? POLLOUT : 0)};
	if (poll(l->polls, (nfds_t)l->conns, 30000) <= 0)
		die("the target is silent for 30 s");
	for (int i = 0; i < l->conns; i++) {
		if (l->polls[i].revents & ~POLLOUT)
			receive(&l->conn[i], buf, size);
		if (l->polls[i].revents)
			submit(&l->conn[i]);
	}
}

static int inflight(const struct load *l)
{
	int n = 0;
	for (int i = 0; i < l->conns; i++)
		n += l->conn[i].inflight;
	return n;
}

int main(int argc, char **argv)
{
	static struct load l = {.tally.rng = 88172645463325252u};
	if (argc < 8) {
		fprintf(stderr, "usage: rawload URL read|write rand|seq BYTES QD SECONDS SPAN_MIB [CONNECTIONS]\n");
		return 2;
	}
	l.write = !strcmp(argv[2], "write");
	l.rand = !strcmp(argv[3], "rand");
	l.bytes = atoi(argv[4]);
	l.qd = atoi(argv[5]);
	l.conns = argc > 8 ? atoi(argv[8]) : 1;
	if (l.bytes < BLOCK || l.bytes % BLOCK || l.qd < 1 || l.qd > 1024 || l.conns < 1 || l.conns > 1024) {
		fprintf(stderr, "rawload: BYTES is a multiple of 4096, QD and CONNECTIONS 1 to 1024\n");
		return 2;
	}
	l.units = (strtoull(argv[7], NULL, 10) << 20) / (uint64_t)l.bytes;
	l.tally.stamp = now_ns() << 8;
	l.conn = calloc((size_t)l.conns, sizeof *l.conn);
	l.polls = calloc((size_t)l.conns, sizeof *l.polls);
	for (int i = 0; i < l.conns; i++)
		raw_open(&l, &l.conn[i], argv[1], i);
	size_t size = 1 << 20;
	uint8_t *buf = malloc(size);
	tally_begin(&l.tally, atof(argv[6]));
	for (int i = 0; i < l.conns; i++)
		submit(&l.conn[i]);
	while (now_ns() < l.tally.end)
		serve(&l, buf, size);
	tally_end(&l.tally);
	uint64_t done = l.tally.done;
	l.stopping = 1;
	while (inflight(&l))
		serve(&l, buf, size);
	tally_print(&l.tally, done, l.bytes);
	return 0;
}
