// A program with operators of its own, which the library's other forms must call: blocks have a mark in front.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>
struct Mark { size_t size, word; };
static std::atomic<long> taken, live;
static const size_t WORD = 0x6d61726bul;
void *operator new(size_t size) {
    auto mark = static_cast<Mark *>(std::malloc(size + sizeof(Mark)));
    if (!mark) throw std::bad_alloc();
    *mark = {size, WORD};
    taken++, live++;
    return mark + 1;
}
void operator delete(void *block) noexcept {
    if (!block) return;
    Mark *mark = static_cast<Mark *>(block) - 1;
    if (mark->word != WORD) {
        std::puts("a block of another new");
        std::fflush(stdout);
        std::abort();
    }
    mark->word = 0;
    live--;
    std::free(mark);
}
struct Plain { int numbers[10]; };
struct Thrown : std::bad_alloc {};
static long work(int seed) {
    std::vector<int> all(60000);
    for (size_t i = 0; i < all.size(); i++) all[i] = int(i * 2654435761u >> 8) % 5000 + seed;
    // Takes its room by the nothrow form.
    std::stable_sort(all.begin(), all.end());
    std::vector<std::string> words;
    for (int i = 0; i < 300; i++) words.push_back(std::string(size_t(i % 90), 'a'));
    return all[30000] + long(words.back().size());
}
int main() {
    long before = taken;
    Plain *volatile one = new Plain, *volatile quiet = new (std::nothrow) Plain, *volatile many = new Plain[7];
    std::printf("%ld taken by three forms\n", taken - before);
    delete one;
    operator delete(quiet, sizeof(Plain));
    delete[] many;
    std::printf("sum %ld\n", work(1));
    std::vector<std::thread> threads;
    std::atomic<long> sum{0};
    for (int n = 0; n < 4; n++) threads.emplace_back([&sum, n] { sum += work(n); });
    for (auto &thread : threads) thread.join();
    std::printf("sums %ld\n", sum.load());
    // A handler may throw: the nothrow form gives null then.
    std::set_new_handler([] { throw Thrown(); });
    struct alignas(64) Wide { char bytes[64]; };
    volatile size_t huge = size_t(1) << 48;
    Wide *volatile none = new (std::nothrow) Wide[huge];
    std::printf("nothing %d\n", none == nullptr);
    try { none = new Wide[huge]; } catch (Thrown &) { std::puts("thrown by the handler"); }
    threads.clear();
    threads.shrink_to_fit();
    std::printf("%ld live\n", live.load());
}
