// The whole malloc family, and C++'s operators, which call it: sizes, alignments, contents, errors.
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <malloc.h>
#include <map>
#include <new>
#include <string>
#include <vector>
static int wrong;
#define CHECK(x) do { if (!(x)) { wrong++; printf("line %d: %s\n", __LINE__, #x); } } while (0)
struct alignas(256) Wide { char bytes[700]; };
static int handled;
static char *reserve;
static void handler() { handled++; std::set_new_handler(nullptr); }
int main(int argc, char **argv) {
    void *volatile p = malloc(100);
    CHECK(malloc_usable_size(p) >= 100 && malloc_usable_size(nullptr) == 0);
    memset(p, 5, 100);
    p = realloc(p, 300000);
    CHECK(static_cast<char *>(p)[99] == 5 && malloc_usable_size(p) >= 300000);
    p = reallocarray(p, 1000, 700);
    CHECK(static_cast<char *>(p)[99] == 5);
    errno = 0;
    CHECK(reallocarray(p, SIZE_MAX / 2, 3) == nullptr && errno == ENOMEM);
    errno = 7;
    free(p);
    CHECK(errno == 7);
    errno = 0;
    volatile size_t huge = SIZE_MAX - 4096;
    CHECK(malloc(huge) == nullptr && errno == ENOMEM);
    CHECK(calloc(huge / 2, 3) == nullptr);
    for (size_t align = 16; align <= 4u << 20; align *= 2) {
        void *volatile a = aligned_alloc(align, align * 2), *volatile b = memalign(align, 5);
        void *c = nullptr;
        CHECK(posix_memalign(&c, align, 77) == 0);
        CHECK((uintptr_t)a % align == 0 && (uintptr_t)b % align == 0 && (uintptr_t)c % align == 0);
        free(a), free(b), free(c);
    }
    void *none = nullptr;
    CHECK(posix_memalign(&none, 3, 8) == EINVAL && posix_memalign(&none, 4, 8) == EINVAL);
    p = valloc(10);
    CHECK((uintptr_t)p % 4096 == 0);
    free(p);
    p = pvalloc(10);
    CHECK((uintptr_t)p % 4096 == 0 && malloc_usable_size(p) >= 4096);
    free(p);
    char *zero = static_cast<char *>(calloc(1000, 1000));
    for (int i = 0; i < 1000000; i += 997) CHECK(zero[i] == 0);
    free(zero);
    Wide *w = new Wide, *ws = new Wide[3];
    CHECK((uintptr_t)w % 256 == 0 && (uintptr_t)ws % 256 == 0);
    delete w;
    delete[] ws;
    int *quiet = new (std::nothrow) int[huge / 8];
    CHECK(quiet == nullptr);
    bool thrown = false;
    std::set_new_handler(handler);
    try { p = ::operator new(huge / 2); } catch (std::bad_alloc &) { thrown = true; }
    CHECK(thrown && handled == 1);
    std::map<std::string, std::vector<std::string>> map;
    for (int i = 0; i < 30000; i++) map[std::to_string(i % 1009)].push_back(std::string(i % 300, 'a' + i % 26));
    unsigned long sum = 0;
    for (auto &[k, v] : map) for (auto &s : v) sum = sum * 31 + s.size() + k.size() + (s.empty() ? 0 : s.back());
    // C23's names, where somebody has them.
    auto free_sized = reinterpret_cast<void (*)(void *, size_t)>(dlsym(RTLD_DEFAULT, "free_sized"));
    if (free_sized) free_sized(malloc(50), 50);
    auto owns = reinterpret_cast<bool (*)(const void *)>(dlsym(RTLD_DEFAULT, "usvm_heap_owns"));
    if (argc > 1 && !strcmp(argv[1], "owned")) {
        p = malloc(10);
        CHECK(owns && owns(p) && owns(map.begin()->second.data()));
        CHECK(free_sized && dlsym(RTLD_DEFAULT, "free_aligned_sized"));
    }
    (void)reserve;
    printf("%d wrong, sum %lu\n", wrong, sum);
    return wrong != 0;
}
