/*
 * What both clients share: the clock, random numbers, the buffers' contents, the histogram, the result.
 *
 * A result is one line of JSON: operations completed within the time asked for, the time it took, and the
 * CPU time (user and system, all of this process) spent in it. Latencies are of all operations, the last ones too.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define BLOCK 4096
#define BUCKETS 4096 /* log-linear: 64 for each power of two of tenths of a microsecond */

struct tally {
	uint64_t begin, end, done, cpu, stamp, rng;
	uint64_t hist[BUCKETS];
};

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static uint64_t cpu_ns(void)
{
	struct rusage r;
	getrusage(RUSAGE_SELF, &r);
	return (uint64_t)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1000000000u + (uint64_t)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1000u;
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
	uint64_t v = ns / 100;
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

static double percentile(const struct tally *t, double p)
{
	uint64_t all = 0, sum = 0;
	for (int b = 0; b < BUCKETS; b++)
		all += t->hist[b];
	for (int b = 0; b < BUCKETS; b++) {
		sum += t->hist[b];
		if (sum && sum >= p * all)
			return bucket_us(b);
	}
	return 0;
}

static void completed(struct tally *t, uint64_t started)
{
	t->hist[bucket(now_ns() - started)]++;
	t->done++;
}

/* buffer_new: half random, half zeros in each block. buffer_stamp makes each block that is written unique. */
static unsigned char *buffer_new(struct tally *t, int bytes)
{
	unsigned char *b = aligned_alloc(BLOCK, bytes);
	for (int o = 0; o < bytes; o += 8) {
		uint64_t v = o % BLOCK < BLOCK / 2 ? xorshift(&t->rng) : 0;
		memcpy(b + o, &v, 8);
	}
	return b;
}

static void buffer_stamp(struct tally *t, unsigned char *b, int bytes)
{
	for (int o = 0; o < bytes; o += BLOCK) {
		uint64_t v = ++t->stamp;
		memcpy(b + o, &v, sizeof v);
	}
}

static void tally_begin(struct tally *t, double seconds)
{
	t->cpu = cpu_ns();
	t->begin = now_ns();
	t->end = t->begin + (uint64_t)(seconds * 1e9);
}

/* tally_end ends the measurement; what completes later counts for latency only. */
static void tally_end(struct tally *t)
{
	t->end = now_ns();
	t->cpu = cpu_ns() - t->cpu;
}

static void tally_print(const struct tally *t, uint64_t done, int bytes)
{
	double s = (t->end - t->begin) / 1e9;
	printf("{\"ops\":%" PRIu64 ",\"seconds\":%.3f,\"iops\":%.1f,\"mbps\":%.2f,\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"client_cpu\":%.4f}\n",
	       done, s, done / s, done * (double)bytes / s / 1e6, percentile(t, .5), percentile(t, .99), percentile(t, .999), t->cpu / 1e9 / s);
}
