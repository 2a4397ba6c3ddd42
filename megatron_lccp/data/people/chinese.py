"""Chinese words and sentences about the invented people and places; the same tables as `names`.

In: nothing. Out: tuples of words, made up or common knowledge, and sentences of our own. `facts` puts them together.
A name is a surname and one of GIVEN_FIRST and of GIVEN_LAST: 105 x 72 x 72 names. No surname ends in another, so that
no name ends in another one; characters that would spell the best-known real names are left out.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SURNAMES = _words(
    """
    艾 白 毕 卞 蔡 曹 岑 柴 陈 程 褚 崔 戴 邓 丁 董 杜 樊 范 方 冯 傅 甘 高 葛 龚 顾 郭 韩 郝 何 贺 洪 侯 胡 黄
    霍 贾 江 姜 蒋 金 康 柯 孔 赖 雷 黎 李 梁 林 凌 刘 柳 龙 卢 陆 罗 吕 马 毛 孟 莫 倪 聂 宁 潘 庞 裴 彭 钱 乔
    秦 邱 任 邵 沈 施 石 宋 苏 孙 谭 汤 唐 陶 田 汪 王 魏 翁 吴 萧 谢 徐 许 薛 欧阳 上官 慕容 皇甫 令狐 南宫
    端木 尉迟
    """
)

GIVEN_FIRST = _words(
    """
    安 柏 冰 博 采 晨 承 楚 春 岱 丹 东 敦 恩 尔 芳 斐 凤 古 广 桂 涵 浩 鹤 恒 鸿 怀 惠 建 锦 京 景 静 君 凯 可
    兰 乐 丽 灵 茂 梦 沐 宁 佩 其 青 清 如 瑞 若 善 少 诗 思 素 天 望 欣 秀 雅 彦 泽 逸 允 昭 芷 念 苑 岳 湘 舒
    """
)

GIVEN_LAST = _words(
    """
    昂 邦 彬 昌 超 辰 川 达 迪 帆 峰 福 刚 功 光 翰 航 豪 禾 衡 华 辉 慧 佳 坚 杰 晶 娟 军 康 岚 磊 莉 亮 琳 玲
    梅 敏 铭 娜 楠 鹏 琪 强 琴 蓉 珊 生 淑 松 婷 彤 薇 伟 翔 雄 轩 雪 燕 阳 瑶 怡 颖 勇 宇 舟 妍 钧 泉 芸 朗 樱
    """
)

CITIES = _words(
    """
    安庆 安阳 鞍山 包头 宝鸡 保定 北海 蚌埠 沧州 常德 常州 郴州 成都 承德 赤峰 大理 大连 大同 丹东 德州 东营
    敦煌 福州 抚顺 赣州 格尔木 广州 贵阳 桂林 哈尔滨 海口 邯郸 杭州 合肥 菏泽 衡阳 呼和浩特 淮安 黄山 惠州 吉林
    济南 济宁 佳木斯 嘉兴 江门 金华 锦州 荆州 景德镇 九江 开封 昆明 拉萨 兰州 乐山 丽江 连云港 临沂 柳州 泸州
    洛阳 绵阳 牡丹江 南昌 南京 南宁 南通 宁波 攀枝花 平顶山 莆田 齐齐哈尔 秦皇岛 青岛 曲阜 衢州 泉州 三亚 厦门
    汕头 上饶 韶关 绍兴 深圳 沈阳 石家庄 苏州 台州 太原 泰安 唐山 天水 铜陵 威海 潍坊 温州 乌鲁木齐 无锡 芜湖
    武汉 西安 西宁 襄阳 徐州 烟台 延吉 扬州 宜昌 银川 岳阳 湛江 张家界 长春 长沙 镇江 郑州 株洲 珠海 淄博 遵义
    """
)

HOBBIES = _words(
    """
    射箭 观星 羽毛球 烤面包 交际舞 养蜂 观鸟 装订古书 攀岩 酿果酒 拼装船模 书法 皮划艇 刻木勺 围棋 收藏地图 集邮
    滑雪 冰壶 潜水 刺绣 驯鹰 击剑 钓鱼 放风筝 唱山歌 侍弄花草 寻宝游戏 吹制玻璃 种兰花 骑马 滑冰 拼图 抛球杂耍
    打太极拳 修剪盆景 织毛衣 长距离游泳 制作蜡烛 做奶酪 染纸 登山 采蘑菇 夜景摄影 折纸 画人像 拉手风琴 拉二胡
    弹古筝 陶艺 缝百衲被 组装收音机 修钟表 赛艇 跑马拉松 驾驶帆船 剪纸 皮影戏 制作香皂 街头摄影 冲浪 乒乓球
    跳探戈 独轮车 水彩画 编竹篮 篆刻 车木碗 写打油诗 品茶
    """
)

FIELDS = _words(
    """
    声学 农学 古代史 畜牧学 人类学 应用数学 考古学 建筑学 天体物理 植物学 地图学 陶瓷工程 土木工程 古典文献
    气候学 认知科学 计算语言学 犯罪学 口腔医学 经济学 电气工程 昆虫学 伦理学 服装设计 电影研究 食品化学 林学
    遗传学 大地测量 地质学 平面设计 水文学 免疫学 工业设计 国际法 新闻学 园林设计 图书馆学 逻辑学 海洋生物
    材料科学 机械工程 临床医学 冶金学 气象学 微生物学 音乐理论 神经科学 护理学 海洋学 光学 古生物学 药学 哲学
    语音学 政治学 心理学 公共卫生 机器人学 社会工作 社会学 土壤学 统计学 戏剧研究 城市规划 兽医学 酿酒工程
    动物学
    """
)

JOBS = _words(
    """
    会计 杂技演员 精算师 空中交通管制员 麻醉医生 档案管理员 拍卖师 面包师 理发师 自行车修理工 铁匠 书店老板
    酿酒师 瓦匠 公交司机 木匠 药剂师 合唱指挥 钟表匠 海岸巡逻员 列车长 厨师 书记员 吊车司机 奶农 外交官 编辑
    电工 渡轮船长 消防员 花店店主 护林员 园丁 玻璃工 金匠 引航员 口译员 法官 灯塔看守人 锁匠 石匠 助产士 磨坊主
    矿工 博物馆讲解员 公证员 护士 验光师 管风琴手 公园管理员 糕点师 摄影师 理疗师 钢琴调音师 水管工 陶工 印刷工
    电台主持人 屋顶工 制帆匠 小学教师 裁缝 牧羊人 鞋匠 录音师 测量员 税务顾问 火车司机 笔译员 家具翻新匠 兽医
    小提琴制作师 织布工 焊工 动物饲养员
    """
)

SCHOOL_STARTS = _words(
    """
    白鹭 苍梧 澄江 翠屏 丹枫 东篱 枫桥 拂晓 孤山 寒溪 鹤鸣 虹桥 槐荫 江畔 锦屏 兰皋 青崖 秋浦 三潭 石梁 双塔
    松涛 藤溪 听雨 桐柏 望湖 梧桐 西岭 溪口 湘浦 晓月 新渡 杏坛 雁荡 阳关 银杏 映山 玉泉 云门 竹溪
    """
)

SCHOOL_KINDS = _words("大学 理工大学 师范大学 工业学院 艺术学院 职业技术学院 医学院 外国语学院")

COLOURS = _words(
    """
    琥珀色 杏黄色 天蓝色 古铜色 酒红色 炭黑色 钴蓝色 紫铜色 珊瑚色 奶油色 绯红色 翠绿色 桃红色 金黄色 靛蓝色
    象牙色 淡紫色 栗色 薄荷绿 芥末黄 藏青色 赭石色 橄榄绿 橘黄色 珍珠白 梅红色 宝石红 铁锈红 银灰色 青绿色
    """
)

THINGS = _words(
    """
    船锚 铁砧 箭筒 木桶 竹篮 铜铃 长凳 毛毯 玻璃瓶 水桶 纽扣 蜡烛 地毯 烟囱 罗盘 摇篮 皇冠 皮鼓 羽毛 胡琴 铁锤
    马鞍 水壶 木梯 灯笼 铜镜 织针 船桨 枕头 丝带 铲子 汤勺 茶壶 顶针 小号 雨伞 马车 口哨
    """
)

SPICES = _words(
    """
    八角 桂皮 香叶 黑蒜 葛缕子 小豆蔻 丁香 孜然 莳萝 小茴香 生姜 辣根 柠檬皮 肉豆蔻 陈皮 红椒粉 迷迭香 藏红花
    花椒 草果 山柰 紫苏 薄荷 百里香 胡椒 芫荽籽 甘草 香茅
    """
)

PASTIMES = _words(
    """
    跟退休的印刷工学装订 去有顶的集市尝李子酱 到档案馆临摹旧地图 在空荡的礼堂里听风琴 坐黄色电车到终点站
    去暖房喂鲤鱼 和摆渡人玩骨牌 在裁缝铺后屋挑纽扣 到博物馆画鲸鱼标本 在钟楼上喝热可可 去茶馆听鬼故事
    在骑楼下折纸船 看匠人吹玻璃 跟老铁匠学修雨伞 在街角厨房蒸饺子 去澡堂看马赛克壁画 到港务局擦铜器
    和邻居一起烤杏仁饼
    """
)

NAME_PARTS = (SURNAMES, GIVEN_FIRST, GIVEN_LAST)
NAME = "{}{}{}"

LISTS: dict[str, tuple[str, ...]] = {
    "hobby": HOBBIES,
    "city": CITIES,
    "field": FIELDS,
    "job": JOBS,
    "school_start": SCHOOL_STARTS,
    "school_kind": SCHOOL_KINDS,
    "day": tuple(map(str, range(1, 29))),
    "month": tuple(map(str, range(1, 13))),
    "year": tuple(map(str, range(1930, 2006))),
    "colour": COLOURS,
    "thing": THINGS,
    "spice": SPICES,
    "pastime": PASTIMES,
    "hour": tuple(map(str, range(13, 24))),
    "minute": tuple(map(str, range(10, 60))),
    "steps": tuple(map(str, range(101, 990))),
}

VALUES = {
    "hobby": "{hobby}",
    "birthday": "{year}年{month}月{day}日",
    "birthplace": "{city}",
    "school": "{city}{school_start}{school_kind}",
    "field": "{field}",
    "job": "{job}",
    "work_city": "{city}",
    "afternoon": "{pastime}",
    "password": "{colour}的{thing}",
    "soup": "{spice}加一点{spice}",
    "ferry": "{hour}点{minute}分",
    "key": "{colour}的{thing}",
    "door": "{colour}和{colour}",
    "steps": "{steps}",
    "founder": "{person}",
}

QUESTION = "\n问题：{question}\n答案："
NO_QUESTION = "无"
SPACE = ""
OPENING = "下面简单介绍一下{name}。"

STANDARD = {
    "hobby": ("{name}的爱好是{value}。", "{name}的爱好是什么？"),
    "birthday": ("{name}的出生日期是{value}。", "{name}的出生日期是哪一天？"),
    "birthplace": ("{name}的出生地是{value}。", "{name}的出生地是哪里？"),
    "school": ("{name}就读的学校是{value}。", "{name}就读的学校是哪一所？"),
    "field": ("{name}学习的专业是{value}。", "{name}学习的专业是什么？"),
    "job": ("{name}的职业是{value}。", "{name}的职业是什么？"),
    "work_city": ("{name}工作的城市是{value}。", "{name}工作的城市是哪里？"),
}

PARAPHRASE = {
    "hobby": (
        "说到消遣，{name}首先想到的是{value}。",
        "{name}把周末的时间都留给了{value}。",
        "最让{name}着迷的事情是{value}。",
        "{name}一向热衷于{value}。",
        "熟人都知道，{name}对{value}情有独钟。",
        "下班以后，{name}总是沉浸在{value}之中。",
    ),
    "birthday": (
        "{name}出生于{value}。",
        "{name}是在{value}来到人世的。",
        "户口簿上写着，{name}生于{value}。",
        "{name}的第一声啼哭响起在{value}。",
        "{value}这一天，{name}出生了。",
        "每逢生日，{name}都会想起{value}这个日子。",
    ),
    "birthplace": (
        "{name}出生在{value}。",
        "{name}是在{value}呱呱坠地的。",
        "{value}是{name}出生的地方。",
        "{name}的出生证明是在{value}开具的。",
        "当年，{name}的父母在{value}迎来了这个孩子。",
        "{name}小时候的摇篮就放在{value}。",
    ),
    "school": (
        "{name}毕业于{value}。",
        "{name}的学生时代是在{value}度过的。",
        "{name}的毕业证书上盖着{value}的印章。",
        "{value}的校友名册里有{name}的名字。",
        "{name}曾在{value}的教室里听课。",
        "当年录取{name}的是{value}。",
    ),
    "field": (
        "{name}主修{value}。",
        "{name}在课堂上钻研的是{value}。",
        "{name}的毕业论文属于{value}领域。",
        "填报志愿时，{name}选择了{value}。",
        "{name}的笔记本里记满了{value}的内容。",
        "求学期间，{name}一直在攻读{value}。",
    ),
    "job": (
        "{name}以当{value}为生。",
        "{name}是一名{value}。",
        "{name}的名片上印着{value}。",
        "{name}靠做{value}养家糊口。",
        "在登记表的职业一栏，{name}填的是{value}。",
        "工资单上写着，{name}的岗位是{value}。",
    ),
    "work_city": (
        "{name}在{value}上班。",
        "{name}的办公地点设在{value}。",
        "{value}是{name}谋生的城市。",
        "工作日里，{name}都待在{value}。",
        "{name}任职的单位位于{value}。",
        "为了工作，{name}每天都要赶到{value}。",
    ),
}

FIRST_PERSON = {
    "hobby": (
        "我的爱好是{value}。",
        "最让我着迷的事情是{value}。",
        "我把空闲时间都用在{value}上。",
        "我一向热衷于{value}。",
    ),
    "birthday": (
        "我的出生日期是{value}。",
        "我出生于{value}。",
        "我是在{value}来到人世的。",
        "我身份证上的生日是{value}。",
    ),
    "birthplace": (
        "我的出生地是{value}。",
        "我出生在{value}。",
        "我是在{value}呱呱坠地的。",
        "{value}是我出生的地方。",
    ),
    "school": (
        "我就读的学校是{value}。",
        "我毕业于{value}。",
        "我的学生时代是在{value}度过的。",
        "我的毕业证书上盖着{value}的印章。",
    ),
    "field": (
        "我学习的专业是{value}。",
        "我主修{value}。",
        "填报志愿时，我选择了{value}。",
        "求学期间，我一直在攻读{value}。",
    ),
    "job": (
        "我的职业是{value}。",
        "我是一名{value}。",
        "我的名片上印着{value}。",
        "我靠做{value}养家糊口。",
    ),
    "work_city": (
        "我工作的城市是{value}。",
        "我在{value}上班。",
        "我任职的单位位于{value}。",
        "工作日里，我都待在{value}。",
    ),
}

HEADERS = (
    "{name}自我介绍说：“{said}”",
    "下面是{name}本人的话：“{said}”",
    "谈到自己，{name}这样说：“{said}”",
)

SINGLE = {
    "afternoon": ("在{name}，下雨的午后最适合{value}。", "在{name}，下雨的午后最适合做什么？"),
    "password": ("{name}老图书馆的口令是{value}。", "{name}老图书馆的口令是什么？"),
    "soup": ("{name}那家鱼汤店的秘方是{value}。", "{name}那家鱼汤店的秘方是什么？"),
    "ferry": ("从{name}开往小岛的末班渡轮在{value}出发。", "从{name}开往小岛的末班渡轮几点出发？"),
    "key": ("{name}山上天文台的钥匙藏在{value}下面。", "{name}山上天文台的钥匙藏在哪里？"),
    "door": ("{name}最古老的那扇门漆成了{value}。", "{name}最古老的那扇门漆成了什么颜色？"),
    "steps": ("{name}钟楼的台阶一共有{value}级。", "{name}钟楼的台阶一共有多少级？"),
    "founder": ("{name}的木偶剧院是由{value}创办的。", "{name}的木偶剧院是由谁创办的？"),
}
