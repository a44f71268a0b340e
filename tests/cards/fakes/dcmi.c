/* A small libdcmi.so: it answers from the file that FAKE_CARDS names, read anew at every call.
 *
 *   module 0 2           module 0 has two dies (910C; 1: 910B); logical ids count through
 *   health 0 1 2         module, die, health
 *   code 0 1 80E18402    an error code of a die; any number of lines
 *   absent 0 1           the die is not there
 *   fail dcmi_x -8012    dcmi_x answers that
 *   hang dcmi_x          dcmi_x does not return while this line is there
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static FILE *state(void) { return fopen(getenv("FAKE_CARDS"), "r"); }

static int gate(const char *function) {
    for (;;) {
        FILE *file = state();
        char line[256], what[128];
        int result = 0, hang = 0, code;
        while (file && fgets(line, sizeof line, file)) {
            if (sscanf(line, "hang %127s", what) == 1 && !strcmp(what, function)) hang = 1;
            if (sscanf(line, "fail %127s %d", what, &code) == 2 && !strcmp(what, function)) result = code;
        }
        if (file) fclose(file);
        if (!hang) return result;
        usleep(2000);
    }
}
#define GATE { int stop = gate(__func__); if (stop) return stop; }

static int dies(int module) {
    FILE *file = state();
    char line[256];
    int m, n, found = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "module %d %d", &m, &n) == 2 && m == module) found = n;
    if (file) fclose(file);
    return found;
}
static int absent(int module, int die) {
    FILE *file = state();
    char line[256];
    int m, d, found = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "absent %d %d", &m, &d) == 2 && m == module && d == die) found = 1;
    if (file) fclose(file);
    return found;
}

int dcmi_init(void) { GATE return 0; }
int dcmi_get_card_list(int *count, int *list, int length) {
    GATE
    *count = 0;
    for (int module = 0; module < length; module++)
        if (dies(module)) list[(*count)++] = module;
    return 0;
}
int dcmi_get_device_id_in_card(int module, int *max, int *mcu, int *cpu) {
    GATE
    *max = dies(module), *mcu = *max, *cpu = -1;
    return 0;
}
int dcmi_get_device_logic_id(int *logic, int module, int die) {
    GATE
    *logic = die;
    for (int before = 0; before < module; before++) *logic += dies(before);
    return 0;
}
int dcmi_get_device_health(int module, int die, unsigned *health) {
    GATE
    FILE *file = state();
    char line[256];
    int m, d;
    unsigned h;
    *health = absent(module, die) ? 0xFFFFFFFFu : 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "health %d %d %u", &m, &d, &h) == 3 && m == module && d == die) *health = h;
    if (file) fclose(file);
    return 0;
}
int dcmi_get_device_errorcode_v2(int module, int die, int *count, unsigned *codes, unsigned length) {
    GATE
    FILE *file = state();
    char line[256];
    int m, d;
    unsigned code;
    *count = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "code %d %d %x", &m, &d, &code) == 3 && m == module && d == die && (unsigned)*count < length)
            codes[(*count)++] = code;
    if (file) fclose(file);
    return 0;
}
