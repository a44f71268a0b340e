/* A small libnvidia-ml.so.1: it answers from the file that FAKE_CARDS names, read anew at every call.
 *
 *   cards 2              how many there are
 *   xid 0 79             events, delivered once each, in order
 *   lost 1               every question about card 1: NVML_ERROR_GPU_IS_LOST
 *   reset 1              ... NVML_ERROR_RESET_REQUIRED
 *   ecc 0 3 5            volatile and lifetime counts
 *   rows 0 2 1 0         remapped, pending, failed
 *   recovery 0 1         the recovery action
 *   slow 0 64            clocks event reasons
 *   without nvmlX        nvmlX answers NVML_ERROR_NOT_SUPPORTED
 *   hang nvmlX           nvmlX does not return while this line is there
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, TIMEOUT = 10, IS_LOST = 15, RESET_REQUIRED = 16 };
typedef struct { int index; } card_t;
typedef struct { card_t *device; unsigned long long type, data; unsigned gpu, compute; } event_t;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, result;
    union { double d; unsigned u; unsigned long long ull; } value;
} field_t;

static card_t cards[16];
static int delivered;

static int find(const char *key, int index, unsigned long long *a, unsigned long long *b, unsigned long long *c) {
    FILE *file = fopen(getenv("FAKE_CARDS"), "r");
    char line[256], word[64];
    int found = 0;
    while (file && fgets(line, sizeof line, file)) {
        int at = -1;
        unsigned long long x = 0, y = 0, z = 0;
        if (sscanf(line, "%63s %d %llu %llu %llu", word, &at, &x, &y, &z) < 2 || strcmp(word, key) || at != index)
            continue;
        if (a) *a = x;
        if (b) *b = y;
        if (c) *c = z;
        found = 1;
    }
    if (file) fclose(file);
    return found;
}

static int named(const char *key, const char *function) {
    FILE *file = fopen(getenv("FAKE_CARDS"), "r");
    char line[256], word[64], what[128];
    int found = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%63s %127s", word, what) == 2 && !strcmp(word, key) && !strcmp(what, function)) found = 1;
    if (file) fclose(file);
    return found;
}

static int gate(const char *function, card_t *card) {
    while (named("hang", function)) usleep(2000);
    if (named("without", function)) return NOT_SUPPORTED;
    if (card && find("lost", card->index, 0, 0, 0)) return IS_LOST;
    if (card && find("reset", card->index, 0, 0, 0)) return RESET_REQUIRED;
    return SUCCESS;
}
#define GATE(card) { int stop = gate(__func__, card); if (stop) return stop; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; GATE(0) return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "an error"; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, card_t **out) {
    for (unsigned n = 16; n > index; n--)
        if (find("cards", n, 0, 0, 0)) {
            cards[index].index = index;
            *out = &cards[index];
            return SUCCESS;
        }
    return INVALID;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, card_t **out) {
    return nvmlDeviceGetHandleByIndex_v2((unsigned)atoi(strrchr(uuid, '-') + 1), out);
}
int nvmlEventSetCreate(void **set) { *set = &delivered; return SUCCESS; }
int nvmlDeviceRegisterEvents(card_t *card, unsigned long long types, void *set) {
    (void)set;
    GATE(card)
    return types == 8 ? SUCCESS : INVALID;
}
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout) {
    (void)set;
    GATE(0)
    if (timeout != 0) abort(); /* whoever waits here holds up the other questions */
    FILE *file = fopen(getenv("FAKE_CARDS"), "r");
    char line[256];
    int index, count = 0, result = TIMEOUT;
    unsigned long long xid;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "xid %d %llu", &index, &xid) == 2 && count++ == delivered) {
            memset(event, 0, sizeof *event);
            cards[index].index = index;
            event->device = &cards[index];
            event->type = 8;
            event->data = xid;
            delivered++;
            result = SUCCESS;
            break;
        }
    if (file) fclose(file);
    return result;
}
int nvmlDeviceGetTotalEccErrors(card_t *card, int kind, int counter, unsigned long long *count) {
    GATE(card)
    unsigned long long now = 0, lifetime = 0;
    find("ecc", card->index, &now, &lifetime, 0);
    *count = kind != 1 ? 1000 : counter == 0 ? now : lifetime; /* 1: uncorrected; 0: volatile */
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(card_t *card, unsigned *corr, unsigned *unc, unsigned *pending, unsigned *failed) {
    GATE(card)
    unsigned long long a = 0, b = 0, c = 0;
    find("rows", card->index, &a, &b, &c);
    *corr = 7, *unc = (unsigned)a, *pending = (unsigned)b, *failed = (unsigned)c;
    return SUCCESS;
}
int nvmlDeviceGetFieldValues(card_t *card, int count, field_t *fields) {
    GATE(card)
    for (int i = 0; i < count; i++) {
        unsigned long long action = 0;
        find("recovery", card->index, &action, 0, 0);
        fields[i].result = fields[i].field != 230 || named("without", "recovery") ? NOT_SUPPORTED : SUCCESS;
        fields[i].value.u = (unsigned)action;
    }
    return SUCCESS;
}
static int reasons(card_t *card, unsigned long long *mask) {
    *mask = 0;
    find("slow", card->index, mask, 0, 0);
    return SUCCESS;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetCurrentClocksEventReasons(card_t *card, unsigned long long *mask) { GATE(card) return reasons(card, mask); }
#endif
int nvmlDeviceGetCurrentClocksThrottleReasons(card_t *card, unsigned long long *mask) { GATE(card) return reasons(card, mask); }
