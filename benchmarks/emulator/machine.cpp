// Runs the blocks of a kernel, warp by warp, from the instructions that program.py reads out of PTX.
//
// A register is an array of 32 numbers, one a lane, at an offset in its warp's memory; constants are registers that
// nothing writes. Warps run one after another, in random order, each until the block's next barrier. What a barrier, a
// fence of copies or of products should order is thereby out of order where it is missing: copies arrive when they are
// waited for and no earlier, and products read shared memory then. Told as faults are also races of warps for a byte of
// shared memory between two barriers, what was read before it was written, and what is misaligned or out of bounds.
#include "machine.h"
#include "matrices.h"
#include "memory.h"
#include "numbers.h"

#include <random>
#include <thread>

using namespace machine;

namespace {

void branch(Warp& w, const Instruction& i, u32 mask) {
    const u32 rest = w.now.mask & ~mask;
    if (mask && rest) w.others.push_back({rest, w.now.at});
    if (mask) w.now = {mask, i.target};
}
void branch_by_index(Warp& w, const Instruction& i, u32 mask) {
    const u32* index = w.get<u32>(i.operands[0]);
    for (u32 left = mask, first = 1; left; first = 0) {
        const u32 value = index[__builtin_ctz(left)];
        u32 same = 0;
        each(left, [&](int l) { same |= u32(index[l] == value) << l; });
        left &= ~same;
        if (value >= u32(i.listed)) return fault(*w.block, "a branch to nowhere");
        if (!first) w.others.push_back(w.now);
        w.now = {same, w.list(i)[value]};
    }
}
void end(Warp& w, const Instruction&, u32 mask) {
    w.now.mask &= ~mask;
    if (w.now.mask) return;
    w.ended = w.others.empty();
    if (!w.ended) w.now = w.others.back(), w.others.pop_back();
}
void barrier(Warp& w, const Instruction&, u32) {
    if (!w.others.empty()) fault(*w.block, "a barrier for some lanes");
}

void register_all() {
    arithmetic();
    operations["unpack.b32"] = unpack<u16, u32>, operations["unpack.b64"] = unpack<u32, u64>;
#define MOVE(SIZE, KIND)                                                                                             \
    operations["ld.global." KIND] = move<SIZE, false, false>, operations["st.global." KIND] = move<SIZE, false, true>, \
        operations["ld.shared." KIND] = move<SIZE, true, false>, operations["st.shared." KIND] = move<SIZE, true, true>
    MOVE(1, "b8"), MOVE(2, "b16"), MOVE(4, "b32"), MOVE(8, "b64");
#undef MOVE
    operations["ld.param.b32"] = load_parameter<4>, operations["ld.param.b64"] = load_parameter<8>;
    operations["ldmatrix"] = move_matrices<false, false>, operations["ldmatrix.trans"] = move_matrices<true, false>;
    operations["stmatrix"] = move_matrices<false, true>, operations["stmatrix.trans"] = move_matrices<true, true>;
    operations["cp.async"] = start_copy;
    operations["cp.async.commit_group"] = [](Warp& w, const Instruction&, u32) { w.copies.commit(); };
    operations["cp.async.wait_group"] = [](Warp& w, const Instruction& i, u32) {
        w.copies.wait(i.immediate, [&](const Copy& copy) { arrive(w, copy); });
    };
    operations["atom.add.u32"] = atomic_add;
    operations["shfl.bfly"] = shuffle_butterfly, operations["shfl.idx"] = shuffle_index;
    operations["redux.add.s32"] = add_up;
    operations["mma.bf16"] = product<false>, operations["mma.tf32"] = product<true>;
    operations["wgmma.bf16"] = start_product<false>, operations["wgmma.tf32"] = start_product<true>;
    operations["wgmma.commit_group"] = [](Warp& w, const Instruction&, u32) { w.products.commit(); };
    operations["wgmma.wait_group"] = wait_for_products;
    operations["fence"] = [](Warp&, const Instruction&, u32) {};
    operations["bra"] = branch, operations["brx"] = branch_by_index, operations["ret"] = end;
    operations["bar"] = barrier;
}

// Lanes that went different ways: those furthest behind run first, and meet the others there.
void bring_together(Warp& w) {
    for (size_t o = 0; o < w.others.size(); o++) {
        if (w.others[o].at < w.now.at) std::swap(w.now, w.others[o]), o = -1;
        else if (w.others[o].at == w.now.at) {
            w.now.mask |= w.others[o].mask;
            w.others.erase(w.others.begin() + o), o = -1;
        }
    }
}

constexpr u64 ENDLESS = 10'000'000;  // instructions of a warp between two barriers
void run_to_barrier(Warp& w) {
    const Kernel& kernel = *w.block->launch->kernel;
    u64 count = 0;
    for (bool stopped = false; !stopped && !w.ended; count++) {
        if (!w.others.empty()) bring_together(w);
        const Instruction& i = kernel.instructions[w.now.at++];
        w.block->now = &i;
        u32 mask = w.now.mask;
        if (i.predicate >= 0) {
            const u8* p = w.get<u8>(i.predicate);
            u32 holds = 0;
            for (int l = 0; l < LANES; l++) holds |= u32(p[l] != 0) << l;
            mask &= i.negated ? ~holds : holds;
        }
        if (mask) i.run(w, i, mask);
        stopped = i.run == barrier;
        if (count > ENDLESS) fault(*w.block, "no end"), w.ended = true;
    }
    w.block->counts.instructions += count;
}

void run_block(Block& b, std::vector<u8>& registers, const std::vector<u8>& begin, const int* special,
               std::mt19937& random) {
    const Launch& launch = *b.launch;
    b.shared.assign(launch.shared, 0xff), b.shadows.assign(launch.shared, Shadow()), b.barriers = 0;
    std::vector<Warp> warps(launch.warps);
    std::vector<Warp*> order;
    for (int n = 0; n < launch.warps; n++) {
        Warp& w = warps[n];
        w.registers = registers.data() + n * begin.size(), w.block = &b, w.number = n;
        std::memcpy(w.registers, begin.data(), begin.size());
        for (int l = 0; l < LANES; l++) {
            const u32 values[] = {b.at[0],        b.at[1],        b.at[2],           launch.grid[0],
                                  launch.grid[1], launch.grid[2], u32(LANES * n + l)};
            for (int s = 0; s < 7; s++)
                if (special[s] >= 0) w.get<u32>(special[s])[l] = values[s];
        }
        order.push_back(&w);
    }
    for (size_t running = warps.size(); running;) {
        std::shuffle(order.begin(), order.end(), random);
        for (Warp* w : order) run_to_barrier(*w);
        running = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return !w.ended; });
        if (running && running < warps.size()) return fault(b, "a warp ended before a barrier");
        b.barriers++;
    }
    for (const Warp& w : warps)
        if (!w.copies.waited_for() || !w.products.waited_for()) fault(b, "a copy or product that nobody waits for");
}

}  // namespace

extern "C" {

void* machine_kernel() {
    static const bool once = (register_all(), true);
    (void)once;
    return new Kernel;
}

// Returns whether there is such an operation.
int machine_add(void* handle, const char* name, int predicate, int negated, const int* operands, const int* list,
                int listed, s64 immediate, int size, int target, int line) {
    Kernel& kernel = *static_cast<Kernel*>(handle);
    const auto found = operations.find(name);
    if (found == operations.end()) return false;
    const int at = kernel.lists.size();
    Instruction i{found->second, predicate, negated, {}, at, listed, immediate, size, target, line};
    std::copy(operands, operands + 4, i.operands);
    kernel.lists.insert(kernel.lists.end(), list, list + listed);
    kernel.instructions.push_back(i);
    return true;
}

void machine_registers(void* handle, const u8* registers, s64 size) {
    static_cast<Kernel*>(handle)->registers.assign(registers, registers + size);
}

// special: registers of the block's number in x, y, z, the grid's size in x, y, z, and the thread's number, -1: not
// used. parameters, at, sizes: their values, registers and bytes. memory: pairs of begin and end. told: 2,000
// characters. counts: as in Counts. Returns the number of faults.
int machine_run(void* handle, const u32* grid, int warps, int shared, const int* special, const u64* parameters,
                const int* at, const int* sizes, int count, const u64* memory, int ranges, int threads, int seed,
                char* told, u64* counts) {
    Launch launch;
    launch.kernel = static_cast<Kernel*>(handle), launch.warps = warps, launch.shared = shared;
    std::copy(grid, grid + 3, launch.grid);
    for (int r = 0; r < ranges; r++) launch.memory.push_back({memory[2 * r], memory[2 * r + 1]});
    std::vector<u8> begin = launch.kernel->registers;
    for (int p = 0; p < count; p++)
        for (int l = 0; l < LANES && at[p] >= 0; l++)
            std::memcpy(begin.data() + at[p] + l * sizes[p], &parameters[p], sizes[p]);

    std::vector<u64> order(u64(grid[0]) * grid[1] * grid[2]);
    for (u64 n = 0; n < order.size(); n++) order[n] = n;
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    std::atomic<u64> next{0};
    auto work = [&](int thread) {
        std::mt19937 random(seed + thread + 1);
        std::vector<u8> registers(warps * begin.size());
        Block b;
        b.launch = &launch;
        for (u64 n; (n = next++) < order.size() && launch.faults < MANY;) {
            const u64 block = order[n];
            b.at[0] = block % grid[0], b.at[1] = block / grid[0] % grid[1], b.at[2] = block / grid[0] / grid[1];
            run_block(b, registers, begin, special, random);
        }
        std::lock_guard<std::mutex> lock(launch.telling);
        launch.counts.instructions += b.counts.instructions, launch.counts.products += b.counts.products;
        launch.counts.global += b.counts.global, launch.counts.shared += b.counts.shared;
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(work, t);
    work(0);
    for (std::thread& t : others) t.join();
    std::memcpy(counts, &launch.counts, sizeof launch.counts);
    std::strncpy(told, launch.told.c_str(), 1999);
    return launch.faults;
}
}