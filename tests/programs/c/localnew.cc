// For local.c: a new that fails throws.
#include <cstddef>
#include <new>
extern "C" int tried() {
    volatile size_t huge = size_t(1) << 60;
    try { char *volatile block = new char[huge]; return block != nullptr; } catch (std::bad_alloc &) { return 42; }
}
